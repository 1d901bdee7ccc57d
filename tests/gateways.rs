//! Several servers on one bucket behind a real haproxy, one of which is killed during transfers.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::commands::Running;
use support::gateway::{Gateway, HOST};
use support::wait::wait_until;
use support::{MIB, noise};

/// Starts haproxy with the example configuration and the addresses of this test. Clients connect to
/// it from then on.
fn start_haproxy(gateway: &mut Gateway, servers: [String; 2]) -> Running {
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
    let mut command = gateway.command("haproxy");
    let haproxy = Running::spawn(command.args(["-db", "-q", "-f", "haproxy.cfg"]));
    wait_until("haproxy listens", || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    gateway.port = port;
    gateway.configure_ssh();
    haproxy
}

/// Where a server listens, and the port at which it reports its health, as haproxy wants them.
fn backend(port: u16, metrics_port: Option<String>) -> String {
    let metrics_port = metrics_port.expect("metrics are on");
    format!("127.0.0.1:{port} port {metrics_port}")
}

/// From an address that is not haproxy's.
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
    let metrics = "metrics on 127.0.0.1:";
    let backends = [
        backend(gateway.port, gateway.said(metrics)),
        backend(second.address.port(), second.said(metrics)),
    ];
    let _haproxy = start_haproxy(&mut gateway, backends);
    gateway.run(&mut sftp(&gateway, "mkdir", "mkdir d"));
    // As many sessions as there are gateways, so that each of them serves one.
    for _ in 0..2 {
        gateway.run(&mut sftp(&gateway, "cd", "cd d\nls"));
    }
    let jobs = 4;
    let most = 8;
    let stored = AtomicUsize::new(0);
    let mut second = Some(second);
    let large = noise(6 * MIB, 1);
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
                    // A job that is told of a failure tries again.
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
        wait_until("a quarter is stored", || {
            stored.load(Ordering::Relaxed) * 4 > jobs * most
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
    // A server that starts aborts what the killed one had begun.
    gateway.expire_empty_uploads();
    if !gateway.age_uploads(Duration::from_secs(25 * 60 * 60)) {
        return;
    }
    let restarted = gateway.another(&[]);
    wait_until("nothing is left in progress", || {
        gateway.uploads().is_empty()
    });
    drop(restarted);
}
