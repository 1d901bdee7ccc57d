//! Logins from a database: argon2id hashes, and the networks that each user may come from.
//!
//! `cargo run --example database_auth users.db add alice SECRET 127.0.0.0/8` adds a user,
//! `cargo run --example database_auth users.db` serves. Then `sftp -P 2222 alice@127.0.0.1`.

use anyhow::{Context, bail};
use async_trait::async_trait;
use ipnet::IpNet;
use rusqlite::{Connection, OptionalExtension};
use sftpd::server::Server;
use sftpd::store::memory::MemoryStore;
use sftpd::users::{Account, Attempt, Auth, Login, PasswordCheck, Proof, hash_password};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS users (
    name TEXT PRIMARY KEY, hash TEXT NOT NULL, network TEXT NOT NULL, home TEXT NOT NULL)";

/// A row of the table.
struct User {
    hash: String,
    network: String,
    home: String,
}

struct Database {
    connection: Mutex<Connection>,
}

impl Database {
    fn open(file: &str) -> anyhow::Result<Database> {
        let connection = Connection::open(file)?;
        connection.execute(SCHEMA, [])?;
        Ok(Database {
            connection: Mutex::new(connection),
        })
    }

    fn add(&self, name: &str, password: &str, network: &str) -> anyhow::Result<()> {
        let network: IpNet = network.parse().context("no network")?;
        let row = (
            name,
            hash_password(password)?,
            network.to_string(),
            format!("{name}/"),
        );
        let insert = "INSERT OR REPLACE INTO users (name, hash, network, home) VALUES (?, ?, ?, ?)";
        self.connection().execute(insert, row)?;
        Ok(())
    }

    fn find(&self, name: &str) -> rusqlite::Result<Option<User>> {
        let select = "SELECT hash, network, home FROM users WHERE name = ?";
        let found = self.connection().query_row(select, [name], |row| {
            Ok(User {
                hash: row.get(0)?,
                network: row.get(1)?,
                home: row.get(2)?,
            })
        });
        found.optional()
    }

    fn connection(&self) -> std::sync::MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A network that can't be read lets nobody in.
fn comes_from(attempt: &Attempt, network: &str) -> bool {
    match network.parse::<IpNet>() {
        Ok(network) => network.contains(&attempt.peer.ip()),
        Err(_no_network) => false,
    }
}

/// The database as an [`Auth`].
struct DatabaseAuth {
    database: Arc<Database>,
    passwords: PasswordCheck,
}

impl DatabaseAuth {
    /// The user of this name, if there is one. Waits for the disk on a thread that may block.
    async fn find(&self, name: &str) -> anyhow::Result<Option<User>> {
        let database = self.database.clone();
        let name = name.to_owned();
        let found = tokio::task::spawn_blocking(move || database.find(&name));
        Ok(found.await??)
    }
}

#[async_trait]
impl Auth for DatabaseAuth {
    async fn login(&self, attempt: Attempt) -> Login {
        let Proof::Password(password) = &attempt.proof else {
            return Login::Refuse;
        };
        let found = match self.find(&attempt.user).await {
            Ok(found) => found,
            Err(error) => {
                eprintln!("the database fails: {error}");
                return Login::Refuse;
            }
        };
        // A user that does not exist has no hash, and takes as long as any other.
        let hash = found.as_ref().map(|user| user.hash.clone());
        let is_right = self.passwords.is_right(hash, password).await;
        match found {
            Some(user) if is_right && comes_from(&attempt, &user.network) => {
                Login::Accept(Account::new(&attempt.user).home(user.home))
            }
            Some(_) | None => Login::Refuse,
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (file, address) = match arguments.as_slice() {
        [file, "add", name, password, network] => {
            return Database::open(file)?.add(name, password, network);
        }
        [file] => (file, "127.0.0.1:2222"),
        [file, address] => (file, *address),
        _ => bail!("give a file, or a file, `add`, name, password and network"),
    };
    let auth = DatabaseAuth {
        database: Arc::new(Database::open(file)?),
        passwords: PasswordCheck::default(),
    };
    let server = Server::builder(Arc::new(MemoryStore::default()), auth).build()?;
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);
    let ctrl_c = async { drop(tokio::signal::ctrl_c().await) };
    server.serve(listener, ctrl_c).await;
    Ok(())
}
