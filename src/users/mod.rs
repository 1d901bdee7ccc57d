//! Who may log in: the [`Auth`] trait, users.json and lists of users behind it.
//!
//! Called by `server` at every login and by `sftpd users …`. Invariants: the file is replaced,
//! never rewritten in place; a file that can't be read as a whole leaves the users of the last good
//! file in force.

mod account;
mod certificate;
mod file;
mod file_auth;
mod file_watch;
mod keys;
mod list;
mod login;
mod password;

pub use account::{Access, Account, UnknownAccess};
pub use certificate::{Certificate, InvalidCertificate};
pub use file::{MAX_USERS_FILE_SIZE, User, UsersFile, UsersFileError, check_name};
#[doc(hidden)]
pub use file::{exposure, follow_link, normalize_home};
pub use file_auth::FileAuth;
pub use keys::{InvalidKey, PublicKey};
#[doc(hidden)]
pub use keys::{PRIVATE_KEY, is_private_key};
pub use list::UserList;
pub use login::{Attempt, Auth, Login, Proof, Refusal};
pub use password::{PasswordCheck, hash_password, random_password};
