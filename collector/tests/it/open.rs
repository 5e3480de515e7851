//! `gannet-collector open`: one profile of a file on the page.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use gannet_proto::pprof::{Encoding, encode, encode_as};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{CPU, get, post, profile};

/// `gannet-collector open` with its link.
struct Page {
    child: Child,
    addr: SocketAddr,
    /// Path of the link: the page with the range of the profile.
    path: String,
}

impl Page {
    /// Starts it with a directory for temporary files.
    fn start(args: &[&str], directory: &Path, input: &[u8]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
            .arg("open")
            .args(args)
            .env("TMPDIR", directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (addr, path) = line.trim().strip_prefix("http://").unwrap().split_once('/').unwrap();
        Self { child, addr: addr.parse().unwrap(), path: format!("/{path}") }
    }

    fn interrupt(&mut self) {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // It has ended already, unless the test failed.
        let _ = self.child.kill();
    }
}

/// Checks the page, its graph and its series, for a file of years ago. Nothing can be sent to it, no other site can read it, and
/// it leaves no file behind.
#[tokio::test]
async fn a_file_is_shown_until_ctrl_c() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("slow.pb.gz");
    let pprof = encode(&profile(CPU, &[("main;work;sum", 3), ("main;idle", 1)]));
    std::fs::write(&file, &pprof).unwrap();
    let temporary = dir.path().join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let mut page = Page::start(&[file.to_str().unwrap()], &temporary, &[]);

    let html = get(page.addr, &page.path).await;
    assert_eq!((html.status, html.text().contains("<html")), (200, true), "{}", html.text());
    let range = page.path.trim_start_matches("/?").replace("profile=", "profile_id=");
    let graph = get(page.addr, &format!("/api/v1/flamegraph?{range}")).await.json();
    assert_eq!(
        (&graph["total"], &graph["root"]["children"][0]["name"]),
        (&40_000_000.into(), &"main".into())
    );
    // The range of the link has the profile too.
    let range = range.rsplit_once('&').unwrap().0.to_owned();
    let series = get(page.addr, &format!("/api/v1/series?{range}")).await.json();
    assert_eq!(series["series"][0]["labels"], serde_json::json!({ "service_name": "slow" }));
    let time = "type=cpu/nanoseconds&step_ms=1000&";
    for (path, more) in [("timeline", time), ("heatmap", time), ("annotations", "")] {
        let answer = get(page.addr, &format!("/api/v1/{path}?{more}{range}")).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
    for path in ["/api/v1/nodes", "/api/v1/rules", "/readyz"] {
        assert_eq!(get(page.addr, path).await.status, 200, "{path}");
    }

    let pushed = post(page.addr, "/ingest?name=x&format=pprof", &[], &pprof).await;
    assert_eq!(pushed.status, 404, "{}", pushed.text());
    let (mut foreign, mut answer) = (std::net::TcpStream::connect(page.addr).unwrap(), String::new());
    foreign.write_all(b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n").unwrap();
    foreign.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 1);
    page.interrupt();
    assert_eq!(std::fs::read_dir(&temporary).unwrap().count(), 0);
}

#[tokio::test]
async fn a_profile_comes_from_standard_input() {
    let dir = tempfile::tempdir().unwrap();
    let pprof = encode_as(&profile(CPU, &[("main;work", 3)]), Encoding::Zstd);
    let mut page = Page::start(&["--name", "shop", "-"], dir.path(), &pprof);
    let range = page.path.trim_start_matches("/?").rsplit_once('&').unwrap().0.to_owned();
    let values = get(page.addr, &format!("/api/v1/labels/service_name/values?{range}")).await.json();
    assert_eq!(values["values"], serde_json::json!(["shop"]));
    page.interrupt();
}

#[test]
fn a_file_that_cannot_be_shown_is_named_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.path().join(name), bytes).unwrap();
        dir.path().join(name).to_str().unwrap().to_owned()
    };
    let good = write("good", &encode(&profile(CPU, &[("main", 1)])));
    for (file, args, want) in [
        (write("text", b"no profile"), &[][..], "must be a profile in pprof"),
        (write("empty", &encode(&profile(CPU, &[("main", 0)]))), &[], "no sample with a positive value"),
        (dir.path().join("missing").to_str().unwrap().to_owned(), &[], "No such file"),
        (good, &["--port", &port], "the port is in use"),
    ] {
        let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
            .args(["open", &file])
            .args(args)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&stderr).into_owned();
        assert_eq!((status.code(), stdout.len()), (Some(1), 0), "{text}");
        assert!(text.contains(&file) && text.contains(want), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}
