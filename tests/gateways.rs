//! Several servers on one bucket behind a real haproxy, one of them killed in mid-run.

// A panic is how a test fails, in its helpers too.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "support/process.rs"]
mod process;
#[path = "support/s3.rs"]
mod s3;

use process::*;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The configuration in contrib/, with the addresses of this test.
fn balance(gateway: &mut Gateway, servers: [String; 2]) -> Running {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut config = include_str!("../contrib/haproxy.cfg").to_owned();
    for (theirs, ours) in [
        ("bind :22", format!("bind 127.0.0.1:{port}")),
        ("10.0.0.11:2222", servers[0].clone()),
        ("10.0.0.12:2222", servers[1].clone()),
    ] {
        assert!(config.contains(theirs), "{theirs}");
        config = config.replace(theirs, &ours);
    }
    gateway.write("haproxy.cfg", config);
    let haproxy =
        Running::spawn(
            gateway
                .command("haproxy")
                .args(["-db", "-q", "-f", "haproxy.cfg"]),
        );
    eventually("haproxy listens", || {
        TcpStream::connect(("127.0.0.1", port)).ok()
    });
    gateway.port = port;
    gateway.configure_ssh();
    haproxy
}

/// Where a server listens, and where it says whether it is well.
fn place(port: u16, log: &str) -> String {
    let metrics = log
        .lines()
        .find_map(|line| Some(line.split_once("metrics on 127.0.0.1:")?.1))
        .unwrap();
    format!("127.0.0.1:{port} port {metrics}")
}

/// From an address that haproxy has not.
fn sftp(gateway: &Gateway, batch: &str, commands: &str) -> Command {
    gateway.write(batch, commands);
    let mut command = gateway.command("sftp");
    command.arg("-F").arg(gateway.ssh_config()).args([
        "-o",
        "BindAddress=127.0.0.2",
        "-b",
        batch,
        HOST,
    ]);
    command
}

#[test]
fn clients_behind_haproxy_lose_nothing_when_a_gateway_dies() {
    let args = [
        "--dir-markers",
        "--proxy-protocol",
        "127.0.0.1",
        "--metrics",
        "127.0.0.1:0",
    ];
    let Some(mut gateway) = Gateway::start_with(&["sftp", "haproxy"], &args) else {
        return;
    };
    let second = gateway.another(&args);
    let places = [
        place(gateway.port, &gateway.log()),
        place(second.port, &second.log()),
    ];
    let _haproxy = balance(&mut gateway, places);
    gateway.run(&mut sftp(&gateway, "mkdir", "mkdir d"));
    // As many as there are gateways, so that each is asked.
    (0..2).for_each(|_| drop(gateway.run(&mut sftp(&gateway, "cd", "cd d\nls"))));
    let (jobs, most) = (4, 8);
    let stored = AtomicUsize::new(0);
    let mut second = Some(second);
    let large = noise(6 * 1024 * 1024, 1);
    gateway.write("large", &large);
    std::thread::scope(|scope| {
        for job in 0..jobs {
            let (gateway, stored) = (&gateway, &stored);
            scope.spawn(move || {
                for n in 0..most {
                    let small = format!("small {job} {n}");
                    gateway.write(&small, &small);
                    let batch = format!("batch {job}");
                    let put = format!("put large d/large{job}{n}\nput \"{small}\" d/\n");
                    // As any job does that was told of a failure: again.
                    let tries =
                        (1..).find(|_| sftp(gateway, &batch, &put).status().unwrap().success());
                    assert!(
                        tries.is_some_and(|tries| tries < 20),
                        "{job} {n}: {tries:?}"
                    );
                    stored.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        eventually("a quarter is stored", || {
            (stored.load(Ordering::Relaxed) * 4 > jobs * most).then_some(())
        });
        let log = second.take().map(|second| second.log()).unwrap();
        assert!(
            log.contains("alice@127.0.0.2:") && !log.contains("alice@127.0.0.1:"),
            "{log}"
        );
    });
    assert!(
        gateway.log().contains("alice@127.0.0.2:"),
        "{}",
        gateway.log()
    );
    for (job, n) in (0..jobs).flat_map(|job| (0..most).map(move |n| (job, n))) {
        gateway.expect_object(&format!("d/large{job}{n}"), &large);
        gateway.expect_object(&format!("d/small {job} {n}"), format!("small {job} {n}"));
    }
    // What the killed one had begun goes when it starts again.
    gateway.expire_empty_uploads();
    if !gateway.age_uploads(Duration::from_secs(25 * 60 * 60)) {
        return;
    }
    let restarted = gateway.another(&[]);
    eventually("nothing is left in progress", || {
        gateway.uploads().is_empty().then_some(())
    });
    drop(restarted);
}
