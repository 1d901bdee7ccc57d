//! Clients far away, behind a link on which every byte takes its time.

// A panic is how a test fails.
#![allow(clippy::restriction)]

mod support;

use bytes::Bytes;
use futures_util::future::{join, join_all};
use russh_sftp::protocol::OpenFlags;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use support::gateway::{Content, Gateway, HOST};
use support::process::Process;
use support::s3::{FakeS3, Fault, When};
use support::*;

/// Data of one READ or WRITE in bytes.
const BLOCK: usize = 32 * 1024;
/// One way.
const DELAY: Duration = Duration::from_millis(20);

/// Sends a whole file without waiting for an answer in between.
async fn write_at_once(client: &Client, handle: &str, data: &Bytes) {
    let mut writes = Vec::new();
    for (n, block) in data.chunks(BLOCK).enumerate() {
        let offset = (n * BLOCK) as u64;
        writes.push(client.sftp.write(handle, offset, block.to_vec()));
    }
    for answer in join_all(writes).await {
        answer.unwrap();
    }
}

/// Asks for a whole file without waiting for an answer in between.
async fn read_at_once(client: &Client, handle: &str, len: usize) -> Vec<u8> {
    let mut reads = Vec::new();
    for offset in (0..len).step_by(BLOCK) {
        reads.push(client.sftp.read(handle, offset as u64, BLOCK as u32));
    }
    let mut data = Vec::new();
    for answer in join_all(reads).await {
        data.extend(answer.unwrap().data);
    }
    data
}

/// The server's answers to READs fill every buffer up to the client. A server that waits for them
/// to leave would not read the WRITEs behind the READs, and the client would wait as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_fills_its_window_and_reads_nothing_is_served() {
    // Half of the largest window, which is what a client may send at any time.
    const UNASKED: usize = 15 * MIB;
    let s3 = FakeS3::start().await;
    let old = noise(40 * MIB, 1);
    s3.put("alice/old", old.clone());
    let log = "export RUST_LOG=info,sftpd::server=debug";
    let process = Process::start_after(log, &s3, &["--buffer-memory", "128MiB"]);
    let link = Link::start(process.address, DELAY);
    let client = Client::connect_with_window(link.address, 64 * MIB as u32).await;
    let handle = client.open("/first", PUT).await.unwrap();
    write_at_once(&client, &handle, &noise(48 * MIB, 2)).await;
    client.close(&handle).await.unwrap();
    s3.reset();
    let reader = client.open("/old", OpenFlags::READ).await.unwrap();
    let writer = client.open("/new", PUT).await.unwrap();
    let new = noise(UNASKED, 3);
    link.set_deaf(true);
    let reads = read_at_once(&client, &reader, old.len());
    let writes = write_at_once(&client, &writer, &new);
    // The last WRITEs may stay unread until answers leave: the client has sent all by then.
    let until_stored = eventually("two thirds of the WRITEs are in the store", || {
        s3.count("UploadPart") >= 2
    });
    let hear_again = async {
        until_stored.await;
        link.set_deaf(false);
    };
    let ((read, ()), ()) = within("the session", join(join(reads, writes), hear_again)).await;
    client.close(&writer).await.unwrap();
    assert!(read == old);
    assert!(s3.object("alice/new").unwrap() == new);
    let promise = 34 + 128 + 2 * 21 / 4 + 4;
    let peak = process.peak();
    println!("a client that reads nothing: peak RSS {peak} MiB, of {promise}");
    assert!(peak <= promise, "{peak} MiB, of {promise}");
    s3.assert_no_uploads();
}

/// Such clients, many at once.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_send_and_do_not_read_stay_inside_the_formula() {
    const COUNT: usize = 10;
    // Less than the smallest window that may be left, and more than is read ahead.
    const UNASKED: usize = 800 * 1024;
    let s3 = FakeS3::start().await;
    let old = noise(40 * MIB, 1);
    s3.put("alice/old", old.clone());
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let link = Link::start(process.address, DELAY);
    let connect = || Client::connect_with_window(link.address, 64 * MIB as u32);
    let clients = join_all((0..COUNT).map(|_| connect())).await;
    let mut files = Vec::new();
    for (n, client) in clients.iter().enumerate() {
        let reader = client.open("/old", OpenFlags::READ).await.unwrap();
        let writer = client.open(&format!("/{n}"), PUT).await.unwrap();
        files.push((client, reader, writer));
    }
    let new = noise(UNASKED, 2);
    link.set_deaf(true);
    let transfers = files.iter().map(async |(client, reader, writer)| {
        let reads = read_at_once(client, reader, old.len());
        let writes = write_at_once(client, writer, &new);
        let (read, ()) = join(reads, writes).await;
        assert!(read == old);
        client.close(writer).await.unwrap();
    });
    let before = link.delivered();
    let until_sent = eventually("all WRITEs are with the server", || {
        link.delivered() >= before + COUNT * UNASKED
    });
    let hear_again = async {
        until_sent.await;
        link.set_deaf(false);
    };
    within("all sessions", join(join_all(transfers), hear_again)).await;
    let promise = 34 + 32 + COUNT * 21 / 4 + COUNT * 4;
    let peak = process.peak();
    println!("{COUNT} clients that send and do not read: peak RSS {peak} MiB, of {promise}");
    assert!(peak <= promise, "{peak} MiB, of {promise}");
    s3.assert_no_uploads();
}

/// rclone asks for a shell in channels beside its session.
#[tokio::test(flavor = "multi_thread")]
async fn the_window_grows_after_another_channel_has_closed() {
    let s3 = FakeS3::start().await;
    let log = "export RUST_LOG=info,sftpd::server=debug";
    let process = Process::start_after(log, &s3, &[]);
    let link = Link::start(process.address, DELAY);
    let client = Client::connect(link.address).await;
    let mut other = client.ssh.channel().await.unwrap();
    other.exec(true, "md5sum").await.unwrap();
    within("the refusal", async {
        while other.wait().await.is_some() {}
    })
    .await;
    let handle = client.open("/f", PUT).await.unwrap();
    write_at_once(&client, &handle, &noise(24 * MIB, 1)).await;
    client.close(&handle).await.unwrap();
    assert!(process.logged("the SSH window grows to") > 0);
    s3.assert_no_uploads();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_distant_uploads_stay_inside_the_formula() {
    const UPLOADS: usize = 40;
    let s3 = FakeS3::start().await;
    let stall = Fault::Stall(Duration::from_millis(100));
    s3.fault("UploadPart", When::Every, stall);
    let process = Process::start(&s3, &["--buffer-memory", "32MiB"]);
    let link = Link::start(process.address, DELAY);
    let data = noise(12 * MIB, 1);
    let mut puts = tokio::task::JoinSet::new();
    let clients = join_all((0..UPLOADS).map(|_| Client::connect(link.address))).await;
    for (n, client) in clients.into_iter().enumerate() {
        let data = data.clone();
        puts.spawn(async move {
            let handle = client.open(&format!("/{n}"), PUT).await.unwrap();
            write_at_once(&client, &handle, &data).await;
            client.close(&handle).await.unwrap();
        });
    }
    puts.join_all().await;
    let promise = 34 + 32 + UPLOADS * 21 / 4 + UPLOADS * 4;
    let peak = process.peak();
    println!("{UPLOADS} distant uploads at once: peak RSS {peak} MiB, of {promise}");
    assert!(peak <= promise, "{peak} MiB, of {promise}");
    for n in 0..UPLOADS {
        assert!(s3.object(&format!("alice/{n}")).unwrap() == data, "{n}");
    }
    s3.assert_no_uploads();
}

/// Puts a link between the gateway's server and the clients that are started from now on.
fn put_far_away(gateway: &mut Gateway) -> Link {
    let server = SocketAddr::from((Ipv4Addr::LOCALHOST, gateway.port));
    let link = Link::start(server, DELAY);
    gateway.port = link.address.port();
    link
}

/// What is under way when keys are exchanged is not lost, whether the client begins (each 16 MiB)
/// or nobody does (below 64 GiB with this cipher).
fn upload_through_key_exchanges(size: usize, options: &[&str]) {
    let Some(mut gateway) = Gateway::start(&["sftp"]) else {
        return;
    };
    let _link = put_far_away(&mut gateway);
    gateway.configure_ssh();
    let bytes = noise(size, 7);
    gateway.write("file", &bytes);
    let mut sftp = gateway.command("sftp");
    sftp.args(options).arg("-b-").arg("-F");
    sftp.arg(gateway.ssh_config()).arg(HOST);
    gateway.feed(&mut sftp, "put file");
    gateway.expect_object("file", &bytes);
}

#[test]
fn uploads_survive_key_exchanges() {
    upload_through_key_exchanges(100 * MIB, &["-o", "RekeyLimit=16M"]);
}

#[test]
#[ignore = "moves 1.2 GB: for a release build"]
fn uploads_survive_the_first_gigabyte() {
    upload_through_key_exchanges(1200 * MIB, &["-c", "aes128-gcm@openssh.com"]);
}

/// 6,400 READs at once, and their answers through the delay.
#[test]
fn paramiko_gets_200_megabytes() {
    let Some(mut gateway) = Gateway::start(&["python3:paramiko"]) else {
        return;
    };
    let _link = put_far_away(&mut gateway);
    let bytes = noise(200 * MIB, 9);
    gateway.put_object("huge", &bytes);
    let script = r#"
import sys, paramiko
port, _, key = sys.argv[1:]
transport = paramiko.Transport(("127.0.0.1", int(port)), default_window_size=16 << 20)
transport.connect(username="alice", pkey=paramiko.PKey.from_path(key))
sftp = paramiko.SFTPClient.from_transport(transport)
sftp.get("huge", "back")
transport.close()
"#;
    gateway.run(&mut gateway.python(script, &[]));
    assert_eq!(gateway.read("back"), Content(bytes));
}

/// Eight files each way at once in one session, and as many in sessions of their own.
#[test]
fn asyncssh_transfers_in_parallel() {
    let Some(mut gateway) = Gateway::start(&["python3:asyncssh"]) else {
        return;
    };
    let _link = put_far_away(&mut gateway);
    let bytes = noise(10 * MIB, 4);
    gateway.write("file", &bytes);
    let script = r#"
import asyncio, sys, asyncssh
port, _, key = sys.argv[1:]
async def transfer(sftp, name):
    await sftp.put("file", name)
    await sftp.get(name, name)
async def main():
    connection = asyncssh.connect("127.0.0.1", int(port), username="alice", client_keys=[key], known_hosts=None, config=None)
    async with connection as ssh:
        async with ssh.start_sftp_client() as sftp:
            await asyncio.gather(*(transfer(sftp, f"shared-{n}") for n in range(8)))
        sessions = [await ssh.start_sftp_client() for n in range(8)]
        await asyncio.gather(*(transfer(sftp, f"own-{n}") for n, sftp in enumerate(sessions)))
asyncio.run(main())
"#;
    gateway.run(&mut gateway.python(script, &[]));
    for n in 0..8 {
        for name in [format!("shared-{n}"), format!("own-{n}")] {
            gateway.expect_object(&name, &bytes);
            assert!(gateway.read(&name) == Content(bytes.clone()), "{name}");
        }
    }
}
