//! Names of the metrics.
//!
//! Those that count events are recorded by [`events::Metrics`](crate::events::Metrics), the others
//! where they are measured, with the macros of the crate `metrics`. They do nothing until the
//! process installs a recorder: the binary brings Prometheus', an application
//! that embeds the server its own. Names follow [Prometheus'
//! conventions](https://prometheus.io/docs/practices/naming/).

/// Label: version.
pub const BUILD_INFO: &str = "sftpd_build_info";
/// SSH connections that are open.
pub const CONNECTIONS: &str = "sftpd_connections";
/// Limit on connections.
pub const MAX_SESSIONS: &str = "sftpd_max_sessions";
/// Label: reason (full, strangers, descriptors, user_limit).
pub const REFUSED_CONNECTIONS: &str = "sftpd_refused_connections_total";
/// SFTP sessions that are open.
pub const SESSIONS: &str = "sftpd_sessions";
/// Labels: method (key, password, certificate), result (accepted, refused; unheard, of passwords
/// only).
pub const LOGINS: &str = "sftpd_logins_total";
/// Connections that ended before a login. Label: reason (a
/// [`LoginRefusal`](crate::events::LoginRefusal), or no_common_algorithm).
pub const NO_LOGINS: &str = "sftpd_connections_without_login_total";
/// Labels: direction (upload, download), result (ok, failed, cut_off).
pub const TRANSFERS: &str = "sftpd_transfers_total";
/// Labels as for [`TRANSFERS`].
pub const TRANSFERRED_BYTES: &str = "sftpd_transferred_bytes_total";
/// Labels: operation (as S3 calls it), result (ok, refused, throttled, failed, no_answer).
pub const S3_REQUESTS: &str = "sftpd_s3_request_duration_seconds";
/// Lines of the log that were dropped, as it was not read.
pub const DROPPED_LOG_LINES: &str = "sftpd_dropped_log_lines_total";
/// Bytes taken from the pool.
pub const BUFFER_MEMORY: &str = "sftpd_buffer_memory_bytes";
/// Size of the pool in bytes.
pub const BUFFER_MEMORY_LIMIT: &str = "sftpd_buffer_memory_limit_bytes";
/// Files that are open for writing.
pub const OPEN_UPLOADS: &str = "sftpd_open_uploads";
/// Label: result (aborted; left, in the bucket).
pub const ABORTED_UPLOADS: &str = "sftpd_aborted_uploads_total";
/// Users of the users file that is in force.
pub const USERS: &str = "sftpd_users";
/// 0 while the users file cannot be read.
pub const USERS_FILE_OK: &str = "sftpd_users_file_ok";
