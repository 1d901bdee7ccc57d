//! How much memory this process may use, and how many uploads at once fit into that.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Where control groups are mounted
/// ([cgroups(7)](https://man7.org/linux/man-pages/man7/cgroups.7.html)).
const CGROUPS: &str = "/sys/fs/cgroup";
/// Memory of the process without clients, in bytes: code, tables, two password checks.
const IDLE_SERVER: u64 = 34 * 1024 * 1024;
/// Memory of a session with one upload, without the pool, in bytes: 4 MiB and 5.25 MiB.
const SESSION_WITH_UPLOAD: u64 = 37 * 1024 * 1024 / 4;
/// The least that is worth a server, and the most that is expected of one.
const UPLOADS: RangeInclusive<usize> = 16..=1000;

/// How many files can be open for writing at once, with a pool of this many bytes.
pub fn uploads_beside(pool: u64) -> usize {
    let limit =
        read_limit(Path::new(CGROUPS), "/proc/self/cgroup", "/proc/meminfo").unwrap_or(u64::MAX);
    let uploads = limit.saturating_sub(IDLE_SERVER + pool) / SESSION_WITH_UPLOAD;
    let uploads = usize::try_from(uploads).unwrap_or(usize::MAX);
    uploads.clamp(*UPLOADS.start(), *UPLOADS.end())
}

/// The least of the machine's memory and the limits of the control groups of this process, in
/// bytes.
fn read_limit(cgroups: &Path, own_cgroup: &str, meminfo: &str) -> Option<u64> {
    let machine = fs::read_to_string(meminfo)
        .ok()
        .and_then(|text| parse_total(&text));
    let group = fs::read_to_string(own_cgroup)
        .ok()
        .and_then(|text| find_group(&text));
    let mut limits: Vec<u64> = machine.into_iter().collect();
    let mut folder: PathBuf = cgroups.join(group.unwrap_or_default());
    while folder.starts_with(cgroups) {
        // "max" is no limit.
        let text = fs::read_to_string(folder.join("memory.max")).unwrap_or_default();
        let limit: Option<u64> = text.trim().parse().ok();
        limits.extend(limit);
        if !folder.pop() {
            break;
        }
    }
    limits.into_iter().min()
}

/// `MemTotal` ([proc_meminfo(5)](https://man7.org/linux/man-pages/man5/proc_meminfo.5.html)), in
/// bytes.
fn parse_total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// The path of the group in the unified hierarchy, relative to its root.
fn find_group(own_cgroup: &str) -> Option<String> {
    let path = own_cgroup
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))?;
    Some(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_counts() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("system.slice/sftpd.service");
        fs::create_dir_all(&inner).unwrap();
        let [own, meminfo] =
            ["own", "meminfo"].map(|name| folder.path().join(name).display().to_string());
        fs::write(&own, "0::/system.slice/sftpd.service\n").unwrap();
        fs::write(&meminfo, "MemTotal:       4000000 kB\nMemFree: 1 kB\n").unwrap();
        let limit = || read_limit(folder.path(), &own, &meminfo);
        assert_eq!(limit(), Some(4_096_000_000));
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        assert_eq!(limit(), Some(4_096_000_000));
        fs::write(
            folder.path().join("system.slice/memory.max"),
            "2147483648\n",
        )
        .unwrap();
        assert_eq!(limit(), Some(2_147_483_648));
        fs::write(inner.join("memory.max"), "1073741824\n").unwrap();
        assert_eq!(limit(), Some(1_073_741_824));
        assert_eq!(read_limit(folder.path(), "/none", "/none"), None);
    }
}
