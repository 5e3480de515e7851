//! Faulty files under a running collector: each has one line in the log and a metric, and nothing else is lost.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
};

use gannet_proto::query::{FlameGraphRequest, query_service_client::QueryServiceClient};

use crate::{
    kill::free_port,
    support::{Pusher, batch, channel, eventually, metric, now_ms},
    table::{active, files_below, up_to_date},
    verify::three_segments,
};

/// A collector that is killed at the latest with the test.
pub struct Killed(pub Child);

impl Killed {
    pub fn end(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts a collector with tables, whose log goes into a file.
fn spawn(data: &Path, grpc: SocketAddr, http: SocketAddr, log: &Path) -> Killed {
    let child = Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
        .args(["--data", data.to_str().unwrap(), "--min-free-bytes", "0", "--flush-interval", "20ms"])
        .args(["--table", "--table-interval", "100ms"])
        .args(["--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()])
        .env("GANNET_COLLECTOR_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(log).unwrap())
        .spawn();
    Killed(child.unwrap())
}

pub async fn listening(address: SocketAddr) {
    eventually("the collector listens", || async { tokio::net::TcpStream::connect(address).await.is_ok() })
        .await;
}

#[track_caller]
fn check_one_line(log: &Path, name: &str, wanted: &str) {
    let text = fs::read_to_string(log).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains(name)).collect();
    assert!(lines.len() == 1 && lines[0].contains(wanted), "{name}, {wanted}: {lines:#?} of\n{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_faulty_segment_has_one_line_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let segments = three_segments(&data).await;
    let id = |at: usize| segments[at].file_stem().unwrap().to_str().unwrap().to_owned();
    let mut bytes = fs::read(&segments[0]).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&segments[0], &bytes).unwrap();
    bytes = fs::read(&segments[1]).unwrap();
    fs::write(&segments[1], &bytes[..bytes.len() - 1]).unwrap();
    bytes = fs::read(&segments[2]).unwrap();
    let other = |ending: char| format!("{}{ending}", &id(2)[..25]);
    let mut free = ['0', '1', '2', '3']
        .into_iter()
        .filter(|ending| !segments.iter().any(|path| path.ends_with(format!("{}.segment", other(*ending)))));
    let (copy, newer) = (other(free.next().unwrap()), other(free.next().unwrap()));
    fs::write(segments[2].with_file_name(format!("{copy}.segment")), &bytes).unwrap();
    bytes[8] = 7;
    fs::write(segments[2].with_file_name(format!("{newer}.segment")), &bytes).unwrap();

    let (grpc, http, log) = (free_port(), free_port(), dir.path().join("log"));
    let mut child = spawn(&data, grpc, http, &log);
    listening(http).await;
    up_to_date(http).await;
    let mut client = QueryServiceClient::new(channel(grpc).await).max_decoding_message_size(64 << 20);
    let graph = client.flame_graph(FlameGraphRequest::default()).await.unwrap().into_inner();
    assert_eq!((graph.profiles, graph.unreadable_profiles), (10, 2));
    assert!(metric(http, "gannet_collector_store_objects_corrupt_total").await >= 4.0);
    assert_eq!(metric(http, "gannet_collector_table_skipped_profiles_total").await as u64, 2);
    assert_eq!(metric(http, "gannet_collector_table_profiles_total").await as u64, 10);
    // Nothing more is lost than these.
    Pusher::over(channel(grpc).await)
        .await
        .unwrap()
        .store_all(&[batch("new", now_ms(), &[("main", 1)])])
        .await;
    up_to_date(http).await;
    assert_eq!(metric(http, "gannet_collector_table_profiles_total").await as u64, 11);
    child.end();
    check_one_line(&log, &id(0), "lacks damaged profiles");
    check_one_line(&log, &id(1), "lacks damaged profiles");
    check_one_line(&log, &copy, &format!("it is a copy of segment {}", id(2)));
    check_one_line(&log, &newer, "it has version 7");
}

/// Checks the log, the metric, `verify`, and that a repair lets the collector write the damaged table again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_table_is_named_once_and_written_again() {
    let dir = tempfile::tempdir().unwrap();
    let (data, now) = (dir.path().join("data"), now_ms());
    let (table, log) = (data.join("table"), dir.path().join("log"));
    let run = async |rounds: u64| {
        let (grpc, http) = (free_port(), free_port());
        let child = spawn(&data, grpc, http, &log);
        listening(http).await;
        for round in 0..rounds {
            let new = batch("s", now, &[("main;work", round as i64 + 1)]);
            Pusher::over(channel(grpc).await).await.unwrap().store_all(&[new]).await;
            up_to_date(http).await;
        }
        (child, http)
    };
    drop(run(6).await);
    let files = files_below(&table);
    let path = active(&files, "samples").into_iter().next().unwrap();
    let mut bytes = files[&path].to_vec();
    bytes[30] ^= 4;
    fs::write(table.join(&path), bytes).unwrap();

    // The second merge would read the file again.
    let (child, http) = run(12).await;
    eventually("the file is counted", || async {
        metric(http, "gannet_collector_table_damaged_files").await as u64 == 1
    })
    .await;
    assert!(metric(http, "gannet_collector_table_merges_total").await >= 2.0);
    drop(child);
    check_one_line(&log, &path, "its size or its checksum is not that of the log");

    let collector = |verb: &str| {
        let program = Command::new(env!("CARGO_BIN_EXE_gannet-collector"));
        let out = { program }.args([verb, "--data", data.to_str().unwrap()]).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap())
    };
    let (code, text) = collector("verify");
    assert!(
        code == Some(1) && text.starts_with(&format!("table/{path}: its size or its checksum")),
        "{text}"
    );
    assert!(text.trim_end().ends_with(": 1 faults"), "{text}");
    let (code, text) = collector("repair");
    assert!(code == Some(0) && text.contains("\n  set aside as set-aside/table-"), "{text}");
    assert!(!table.join("samples").exists() && table.join("stacks").exists());
    let (code, text) = collector("verify");
    assert!(code == Some(0) && text.contains(" files of tables "), "{text}");

    let (child, http) = run(0).await;
    up_to_date(http).await;
    assert_eq!(metric(http, "gannet_collector_table_sample_rows_total").await as u64, 18);
    drop(child);
    assert_eq!(collector("verify").0, Some(0));
}
