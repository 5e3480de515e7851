//! The binary: flags, exit codes, signals.

use std::{
    process::{Command, Output, Stdio},
    time::Duration,
};

use crate::{
    kill::{free_port, spawn},
    support::{Pusher, batch, channel, eventually, get, now_ms},
};

fn run(args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
        .args(["--data", dir.path().to_str().unwrap()])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn a_port_in_use_is_one_line_with_its_flag() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    for (flag, other) in [("--grpc-listen", "--http-listen"), ("--http-listen", "--grpc-listen")] {
        let out = run(&[flag, &addr, other, "127.0.0.1:0"]);
        assert_eq!(out.status.code(), Some(1));
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(text.contains(&format!("{flag} {addr}: the port is in use")), "{text}");
        assert_eq!(text.trim().lines().count(), 1, "{text}");
    }
}

#[test]
fn plaintext_beyond_loopback_needs_insecure() {
    let out = run(&["--grpc-listen", "0.0.0.0:0", "--http-listen", "127.0.0.1:0"]);
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("--tls-cert") && text.contains("--insecure"), "{text}");
}

#[test]
fn a_wrong_flag_is_a_usage_error() {
    for args in
        [&["--retention-bytes", "much"][..], &["--tls-cert", "x"], &["--retention-age", "soon"], &["--what"]]
    {
        let out = run(args);
        assert_eq!(out.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&out.stderr).contains(args[0]), "{args:?}");
    }
}

#[test]
fn an_old_variable_is_answered_with_the_new_one() {
    let out = Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
        .env("GANNET_COLLECTOR_HTTP_LOCAL", "127.0.0.1:0")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(2));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    let renamed = "the environment variable GANNET_COLLECTOR_HTTP_LOCAL is now GANNET_COLLECTOR_DEBUG_LISTEN";
    assert_eq!(text.trim(), format!("error: {renamed}"));
}

#[tokio::test]
async fn both_signals_end_it_with_success_despite_open_streams() {
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let dir = tempfile::tempdir().unwrap();
        let (grpc, http) = (free_port(), free_port());
        let mut child = spawn(dir.path(), grpc, http);
        eventually("the collector answers", || async { tokio::net::TcpStream::connect(http).await.is_ok() })
            .await;
        assert_eq!(get(http, "/readyz").await.status, 200);
        let mut pusher = Pusher::over(channel(grpc).await).await.unwrap();
        pusher.store(batch("shop", now_ms(), &[("main", 1)])).await;
        let began = std::time::Instant::now();
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
        let status = tokio::task::spawn_blocking(move || child.wait()).await.unwrap().unwrap();
        assert_eq!(status.code(), Some(0));
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    }
}
