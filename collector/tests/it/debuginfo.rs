//! Names of stripped programs: files are uploaded, and name the profiles that were stored before.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use gannet_collector::{Collector, Config, Running};
use gannet_proto::{
    debuginfo::{
        DebugFile, DeleteDebugInfoRequest, ListDebugInfoRequest, OfferDebugInfoRequest,
        UploadDebugInfoRequest,
        agent_debug_info_service_client::AgentDebugInfoServiceClient,
        debug_info_service_client::DebugInfoServiceClient,
        upload_debug_info_request::{Begin, Message},
    },
    ingest::Batch,
    pprof::{self, Builder, Header, Mapping, Profile},
    query::{FlameGraphRequest, GetProfileRequest, MergeRequest, Selection, merge_progress},
};
use rstest::rstest;
use tokio_stream::iter;
use tonic::{Code, Status, transport::Channel};

use crate::support::{
    CPU, Pusher, at, batch, channel, config_with, download, eventually, get, metric, now_ms, queries,
};

/// `inner` is inlined into `hot`, which prints an address in there. The numbers of the lines count.
const HOT: &str = r#"#include <stdio.h>
__attribute__((noinline)) void *where(void) { return __builtin_return_address(0); }
static inline __attribute__((always_inline)) void inner(void) {
	printf("%p\n", where());
	fflush(stdout);
}
__attribute__((noinline, visibility("hidden"))) void hot(void) {
	inner();
	asm volatile("");
}
void enter(void) { hot(); }
"#;
const MAIN: &str = "#include <unistd.h>\nvoid enter(void);\nint main(void) { enter(); for (;;) pause(); }\n";

#[track_caller]
fn tool(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The part of the test that has the functions.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Pie,
    Fixed,
    Library,
}

/// A program without names, with the files that have them.
struct Stripped {
    program: PathBuf,
    /// The file with the functions, as the compiler wrote it.
    whole: PathBuf,
    /// What `objcopy --only-keep-debug` keeps of it.
    debug: PathBuf,
    build_id: String,
    directory: tempfile::TempDir,
}

impl Stripped {
    fn build(kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("hot.c"), HOT).unwrap();
        std::fs::write(path("main.c"), MAIN).unwrap();
        let gcc = |args: &[&str]| {
            tool(
                Command::new("gcc")
                    .args(["-g", "-O2", "-Wl,--build-id=sha1"])
                    .args(args)
                    .current_dir(&directory),
            );
        };
        let part = match kind {
            Kind::Pie => {
                gcc(&["-pie", "-fPIE", "hot.c", "main.c", "-o", "program"]);
                "program"
            }
            Kind::Fixed => {
                gcc(&["-no-pie", "-fno-PIE", "hot.c", "main.c", "-o", "program"]);
                "program"
            }
            Kind::Library => {
                gcc(&["-shared", "-fPIC", "hot.c", "-o", "libhot.so"]);
                gcc(&["main.c", "libhot.so", "-Wl,-rpath,$ORIGIN", "-o", "program"]);
                "libhot.so"
            }
        };
        let (whole, debug) = (path("whole"), path("debug"));
        std::fs::copy(path(part), &whole).unwrap();
        tool(Command::new("objcopy").arg("--only-keep-debug").args([&whole, &debug]));
        tool(Command::new("strip").args([path("program"), path(part)]));
        let build_id = build_id(&whole);
        Self { program: path("program"), whole, debug, build_id, directory }
    }

    /// Runs the program, and returns a profile of the place that it prints, as an agent without names sends it.
    fn profile(&self) -> Profile {
        let mut child = Killed(Command::new(&self.program).stdout(Stdio::piped()).spawn().unwrap());
        let mut line = String::new();
        BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        // The call before the return address.
        let address = u64::from_str_radix(line.trim().strip_prefix("0x").unwrap(), 16).unwrap() - 1;
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.0.id())).unwrap();
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (start, limit, offset, file) = maps
            .lines()
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let (start, limit) = words[0].split_once('-').unwrap();
                (hex(start), hex(limit), hex(words[2]), words.get(5).copied().unwrap_or_default())
            })
            .find(|(start, limit, ..)| (*start..*limit).contains(&address))
            .unwrap();
        Self::profile_at(address, Mapping { start, limit, offset, file, build_id: &self.build_id })
    }

    fn profile_at(address: u64, mapping: Mapping<'_>) -> Profile {
        let mut builder = Builder::new(Header {
            sample_types: &CPU,
            period_type: CPU[1],
            period: 1,
            time_nanos: 1,
            duration_nanos: 1,
        });
        let mapping = builder.mapping(mapping);
        let location = builder.location(Some(mapping), address, &[]);
        builder.sample(&[location], &[3, 30], &[]);
        builder.finish()
    }

    fn source(&self) -> String {
        self.directory.path().join("hot.c").to_str().unwrap().to_owned()
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn build_id(path: &Path) -> String {
    let output = Command::new("readelf").args(["-n"]).arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().find_map(|line| line.trim().strip_prefix("Build ID: ")).unwrap().to_owned()
}

fn config(data: &Path) -> Config {
    config_with(data, |config| config.debuginfo.reader = env!("CARGO_BIN_EXE_gannet-collector").into())
}

async fn start(data: &Path) -> Running {
    Collector::start(config(data)).await.unwrap()
}

fn stored(profile: &Profile) -> Batch {
    Batch { pprof: pprof::encode(profile), samples: 3, ..batch("stripped", now_ms(), &[("x", 3)]) }
}

async fn store(running: &Running, profile: &Profile) -> String {
    let batch = stored(profile);
    let id = batch.batch_id.clone();
    Pusher::open(running.grpc_addr).await.store(batch).await;
    id
}

async fn client(running: &Running) -> DebugInfoServiceClient<Channel> {
    DebugInfoServiceClient::new(channel(running.grpc_addr).await)
}

fn messages(build_id: &str, bytes: &[u8]) -> Vec<UploadDebugInfoRequest> {
    let begin = Begin { build_id: build_id.to_owned(), bytes: bytes.len() as u64 };
    let chunks = bytes.chunks(100_000).map(|chunk| Message::Data(chunk.to_vec()));
    let message = |message| UploadDebugInfoRequest { message: Some(message) };
    std::iter::once(Message::Begin(begin)).chain(chunks).map(message).collect()
}

async fn upload(running: &Running, build_id: &str, bytes: &[u8]) -> Result<DebugFile, Status> {
    let answer = client(running).await.upload_debug_info(iter(messages(build_id, bytes))).await?;
    Ok(answer.into_inner().file.unwrap())
}

/// Returns the functions of the only location with their first lines, innermost first: `inner hot.c:4 from 3`.
fn names(bytes: &[u8]) -> Vec<String> {
    let profile = pprof::decode(bytes, 1 << 20).unwrap();
    pprof::check(&profile).unwrap();
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let [location] = &profile.location[..] else { panic!("{:?}", profile.location) };
    let name = |line: &gannet_proto::profiles::Line| {
        let function = profile.function.iter().find(|function| function.id == line.function_id).unwrap();
        let (file, start) = (text(function.filename), function.start_line);
        format!("{} {file}:{} from {start}", text(function.name), line.line)
    };
    location.line.iter().map(name).collect()
}

async fn merged(running: &Running) -> Vec<u8> {
    let selection = Selection { query: r#"{service_name="stripped"}"#.to_owned(), ..Selection::default() };
    let request = MergeRequest { selection: Some(selection), ..MergeRequest::default() };
    let mut answer = queries(running).await.merge(request).await.unwrap().into_inner();
    let mut bytes = Vec::new();
    while let Some(message) = answer.message().await.unwrap() {
        if let Some(merge_progress::Message::Chunk(chunk)) = message.message {
            bytes.extend(chunk.data);
        }
    }
    bytes
}

async fn flame(running: &Running) -> Vec<String> {
    let selection = Selection { query: r#"{service_name="stripped"}"#.to_owned(), ..Selection::default() };
    let request =
        FlameGraphRequest { selection: Some(selection), flat: true, ..FlameGraphRequest::default() };
    let graph = queries(running).await.flame_graph(request).await.unwrap().into_inner();
    assert_eq!(graph.total, 30);
    graph.nodes.into_iter().map(|node| node.name).collect()
}

/// Checks the whole way: a profile without names is stored, its debug file comes later, and every form of the profile has names and
/// lines then. Without the file, the profile is what was sent.
#[rstest]
#[case::pie(Kind::Pie)]
#[case::fixed_addresses(Kind::Fixed)]
#[case::library(Kind::Library)]
#[tokio::test]
async fn a_later_upload_names_a_stored_profile(#[case] kind: Kind) {
    let stripped = Stripped::build(kind);
    let profile = stripped.profile();
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let id = store(&running, &profile).await;
    assert_eq!(download(&running, &id).await.unwrap(), pprof::encode(&profile));
    assert_eq!(names(&merged(&running).await), [""; 0]);
    assert!(!flame(&running).await.contains(&"hot".to_owned()));

    let source = stripped.source();
    let expected = [format!("inner {source}:4 from 3"), format!("hot {source}:8 from 7")];
    for file in [&stripped.debug, &stripped.whole] {
        let bytes = std::fs::read(file).unwrap();
        let stored = upload(&running, &stripped.build_id, &bytes).await.unwrap();
        assert_eq!((stored.bytes, stored.origin.as_str()), (bytes.len() as u64, "upload"));
        assert_eq!(names(&download(&running, &id).await.unwrap()), expected);
        assert_eq!(names(&merged(&running).await), expected);
        let shown = flame(&running).await;
        assert!(["hot", "inner"].iter().all(|name| shown.iter().any(|shown| shown == name)), "{shown:?}");
        // A second time from the caches.
        assert_eq!(names(&merged(&running).await), expected);

        let request = DeleteDebugInfoRequest { build_id: stripped.build_id.clone() };
        client(&running).await.delete_debug_info(request.clone()).await.unwrap();
        assert_eq!(download(&running, &id).await.unwrap(), pprof::encode(&profile));
        assert_eq!(names(&merged(&running).await), [""; 0]);
        let again = client(&running).await.delete_debug_info(request).await.unwrap_err();
        assert_eq!(again.code(), Code::NotFound);
    }
    running.shutdown().await;
}

/// Checks that a file that comes after the sums of a profile names their frames too, also in an answer from the cache.
#[tokio::test]
async fn a_later_upload_names_sums_of_profiles() {
    let stripped = Stripped::build(Kind::Library);
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    crate::table::with_table(&mut config);
    config.query.min_summed_profiles = 0;
    let running = Collector::start(config).await.unwrap();
    let start = Some(at(now_ms() - 120_000));
    let batch = Batch { start, ..stored(&stripped.profile()) };
    Pusher::open(running.grpc_addr).await.store(batch).await;
    crate::table::up_to_date(running.http_addr).await;
    let is_named = async || {
        let selection =
            Selection { query: r#"{service_name="stripped"}"#.to_owned(), ..Selection::default() };
        let request =
            FlameGraphRequest { selection: Some(selection), flat: true, ..FlameGraphRequest::default() };
        let graph = queries(&running).await.flame_graph(request).await.unwrap().into_inner();
        let read = graph.read.unwrap();
        assert_eq!((graph.total, read.sum_profiles, read.segment_profiles), (30, 1, 0));
        graph.nodes.iter().any(|node| node.name == "hot")
    };
    assert!(!is_named().await);
    upload(&running, &stripped.build_id, &std::fs::read(&stripped.debug).unwrap()).await.unwrap();
    assert!(is_named().await && is_named().await);
    let request = DeleteDebugInfoRequest { build_id: stripped.build_id.clone() };
    client(&running).await.delete_debug_info(request).await.unwrap();
    assert!(!is_named().await);
    running.shutdown().await;
}

/// Checks profiles of OpenTelemetry's profiler and others, which send addresses of the file.
#[tokio::test]
async fn addresses_of_the_file_are_named_too() {
    let stripped = Stripped::build(Kind::Library);
    let output = Command::new("nm").arg(&stripped.whole).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.ends_with(" hot")).unwrap();
    let address = u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    upload(&running, &stripped.build_id, &std::fs::read(&stripped.debug).unwrap()).await.unwrap();
    for (start, limit) in [(0, 0), (0, u64::MAX), (0x7f00_0000_0000, 0x7f00_0001_0000)] {
        let mapping = Mapping { start, limit, offset: 0, file: "libhot.so", build_id: &stripped.build_id };
        let id = store(&running, &Stripped::profile_at(address, mapping)).await;
        let names = names(&download(&running, &id).await.unwrap());
        assert!(names.last().is_some_and(|name| name.starts_with("hot ")), "{start:#x}: {names:?}");
    }
    running.shutdown().await;
}

#[tokio::test]
async fn files_are_listed_and_outlive_a_restart() {
    let stripped = Stripped::build(Kind::Pie);
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let id = store(&running, &stripped.profile()).await;
    let bytes = std::fs::read(&stripped.debug).unwrap();
    upload(&running, &stripped.build_id, &bytes).await.unwrap();
    running.shutdown().await;
    // What a crash leaves of an upload.
    let rest = dir.path().join("debuginfo/incoming/rest");
    std::fs::create_dir_all(rest.parent().unwrap()).unwrap();
    std::fs::write(&rest, "rest").unwrap();

    let running = start(dir.path()).await;
    assert!(!rest.exists());
    let list = client(&running).await.list_debug_info(ListDebugInfoRequest {}).await.unwrap().into_inner();
    let [file] = &list.files[..] else { panic!("{list:?}") };
    assert_eq!(
        (&file.build_id, file.bytes, list.bytes),
        (&stripped.build_id, bytes.len() as u64, file.bytes)
    );
    assert_eq!(list.max_bytes, 4 << 30);
    assert_eq!(names(&download(&running, &id).await.unwrap()).len(), 2);
    let again = upload(&running, &stripped.build_id, &bytes).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists, "{again}");
    running.shutdown().await;
}

/// Checks that agents are asked for what is missing, and that a file of a person takes precedence over theirs.
#[tokio::test]
async fn a_persons_file_replaces_an_agents() {
    let stripped = Stripped::build(Kind::Pie);
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let id = store(&running, &stripped.profile()).await;
    let mut agent = AgentDebugInfoServiceClient::new(channel(running.grpc_addr).await);
    let offer = OfferDebugInfoRequest { build_ids: vec![stripped.build_id.clone(), "00112233".into()] };
    let wanted = agent.offer_debug_info(offer.clone()).await.unwrap().into_inner();
    assert_eq!((wanted.wanted, wanted.max_bytes), (offer.build_ids.clone(), 1 << 30));

    // The file of the agent has symbols alone.
    let symbols = stripped.directory.path().join("symbols");
    tool(Command::new("objcopy").arg("--strip-debug").args([&stripped.whole, &symbols]));
    let symbols = std::fs::read(symbols).unwrap();
    agent.send_debug_info(iter(messages(&stripped.build_id, &symbols))).await.unwrap();
    assert_eq!(names(&download(&running, &id).await.unwrap()), ["hot :0 from 0"]);
    assert_eq!(names(&merged(&running).await), ["hot :0 from 0"]);
    assert_eq!(agent.offer_debug_info(offer).await.unwrap().into_inner().wanted, ["00112233"]);
    let again = agent.send_debug_info(iter(messages(&stripped.build_id, &symbols))).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);

    upload(&running, &stripped.build_id, &std::fs::read(&stripped.debug).unwrap()).await.unwrap();
    assert_eq!(names(&download(&running, &id).await.unwrap()).len(), 2);
    assert_eq!(names(&merged(&running).await).len(), 2);
    running.shutdown().await;
}

/// The server of elfutils, as distributions run it, over the files of one directory.
struct Server {
    _process: Killed,
    addr: std::net::SocketAddr,
}

impl Server {
    async fn start(files: &Path, state: &Path) -> Self {
        let addr = crate::kill::free_port();
        let process = Command::new("debuginfod")
            .args([
                "-d",
                state.join("debuginfod.sqlite").to_str().unwrap(),
                "-p",
                &addr.port().to_string(),
                "-F",
            ])
            .arg(files)
            .env("DEBUGINFOD_CACHE_PATH", state.join("cache"))
            .env_remove("DEBUGINFOD_URLS")
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(state.join("debuginfod.log")).unwrap())
            .spawn()
            .expect("debuginfod starts: scripts/install-packages test installs it");
        let server = Self { _process: Killed(process), addr };
        let scanned =
            format!("scanned_files_total{{source=\"file\"}} {}\n", std::fs::read_dir(files).unwrap().count());
        eventually("debuginfod has the files", || async {
            tokio::net::TcpStream::connect(addr).await.is_ok() && server.metrics().await.contains(&scanned)
        })
        .await;
        server
    }

    async fn metrics(&self) -> String {
        get(self.addr, "/metrics").await.text()
    }

    /// Returns the number of requests for debug information, found or not.
    async fn requests(&self) -> u64 {
        let text = self.metrics().await;
        let line = text.lines().find(|line| line.starts_with("http_requests_total{type=\"debuginfo\"}"));
        line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }
}

/// Checks that a failure of the reader is no verdict for the life of the collector: the symbol table names the function meanwhile, and
/// the debug information follows, in cached merges too.
#[tokio::test]
async fn debug_information_is_read_again_after_an_error() {
    let stripped = Stripped::build(Kind::Library);
    let dir = tempfile::tempdir().unwrap();
    let reader = dir.path().join("reader");
    let mut config = config(&dir.path().join("data"));
    let program = std::mem::replace(&mut config.debuginfo.reader, reader.clone());
    config.debuginfo.retry_pause = Duration::from_millis(50);
    let running = Collector::start(config).await.unwrap();
    let id = store(&running, &stripped.profile()).await;
    upload(&running, &stripped.build_id, &std::fs::read(&stripped.debug).unwrap()).await.unwrap();
    for _ in 0..2 {
        assert_eq!(names(&download(&running, &id).await.unwrap()), ["hot :0 from 0"]);
        assert_eq!(names(&merged(&running).await), ["hot :0 from 0"]);
    }
    std::os::unix::fs::symlink(program, reader).unwrap();
    eventually("the debug information is read", || async {
        names(&download(&running, &id).await.unwrap()).len() == 2
    })
    .await;
    assert_eq!(names(&merged(&running).await).len(), 2);
    running.shutdown().await;
}

/// Checks the same for a file that cannot be read for a moment.
#[tokio::test]
async fn a_file_is_opened_again_after_an_error() {
    let stripped = Stripped::build(Kind::Library);
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.debuginfo.retry_pause = Duration::from_millis(50);
    let running = Collector::start(config).await.unwrap();
    let id = store(&running, &stripped.profile()).await;
    upload(&running, &stripped.build_id, &std::fs::read(&stripped.debug).unwrap()).await.unwrap();
    let file = file_of(&dir.path().join("debuginfo"), &stripped.build_id);
    let away = dir.path().join("away");
    std::fs::rename(&file, &away).unwrap();
    // A read of a directory fails.
    std::fs::create_dir(&file).unwrap();
    for _ in 0..2 {
        assert_eq!(names(&merged(&running).await), [""; 0]);
    }
    std::fs::remove_dir(&file).unwrap();
    std::fs::rename(&away, &file).unwrap();
    eventually("the file is opened", || async { names(&merged(&running).await).len() == 2 }).await;
    assert_eq!(names(&download(&running, &id).await.unwrap()).len(), 2);
    running.shutdown().await;
}

/// Returns the path of the stored file of a build id, in the layout that gdb knows.
fn file_of(directory: &Path, build_id: &str) -> PathBuf {
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.to_str().unwrap().contains(&build_id[2..]) {
                return path;
            }
        }
    }
    panic!("no file of {build_id}");
}

/// Checks that each answer says so if the search for names ran out of time, and that a later one has the names.
#[tokio::test]
async fn an_answer_without_late_names_says_so() {
    let stripped = Stripped::build(Kind::Library);
    let dir = tempfile::tempdir().unwrap();
    let (reader, go) = (dir.path().join("reader"), dir.path().join("go"));
    let mut config = config(&dir.path().join("data"));
    let (program, go_name) = (config.debuginfo.reader.display(), go.display());
    let script =
        format!("#!/bin/sh\nwhile [ ! -e '{go_name}' ]; do /bin/sleep 0.05; done\nexec '{program}' \"$@\"\n");
    std::fs::write(&reader, script).unwrap();
    std::fs::set_permissions(&reader, std::fs::Permissions::from_mode(0o755)).unwrap();
    config.debuginfo.reader = reader;
    config.debuginfo.query_timeout = Duration::from_millis(200);
    let running = Collector::start(config).await.unwrap();
    let id = store(&running, &stripped.profile()).await;
    assert_eq!(lacks_names(&running, &id).await, [false; 6]);
    upload(&running, &stripped.build_id, &std::fs::read(&stripped.debug).unwrap()).await.unwrap();
    assert_eq!(lacks_names(&running, &id).await, [true; 6]);
    std::fs::write(go, "").unwrap();
    eventually("all answers have the names", || async { lacks_names(&running, &id).await == [false; 6] })
        .await;
    assert_eq!(names(&download(&running, &id).await.unwrap()).len(), 2);
    running.shutdown().await;
}

/// Returns whether these answers say that names are missing: graph, merge and profile by gRPC, then by HTTP.
async fn lacks_names(running: &Running, id: &str) -> [bool; 6] {
    let mut client = queries(running).await;
    let graph = client.flame_graph(FlameGraphRequest::default()).await.unwrap().into_inner().names_incomplete;
    let mut merge = client.merge(MergeRequest::default()).await.unwrap().into_inner();
    let mut of_merge = false;
    while let Some(message) = merge.message().await.unwrap() {
        if let Some(merge_progress::Message::Progress(progress)) = message.message {
            of_merge = progress.names_incomplete;
        }
    }
    let request = GetProfileRequest { id: id.to_owned(), ..GetProfileRequest::default() };
    let mut profile = client.get_profile(request).await.unwrap().into_inner();
    let of_profile = profile.message().await.unwrap().unwrap().names_incomplete;
    let http = |path: String| async move { get(running.http_addr, &format!("/api/v1/{path}")).await };
    let top = http("top".to_owned()).await.json()["names_incomplete"] == true;
    let header = |answer: &crate::support::Answer| answer.headers.contains_key("gannet-names-incomplete");
    let merged = header(&http("merge".to_owned()).await);
    [graph, of_merge, of_profile, top, merged, header(&http(format!("profiles/{id}")).await)]
}

/// Checks the server of Debian's package: a file is asked for once, and a missing one too, by any number of queries.
#[tokio::test]
async fn debuginfod_names_frames_with_one_request() {
    let (known, unknown) = (Stripped::build(Kind::Library), Stripped::build(Kind::Pie));
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("files");
    std::fs::create_dir(&files).unwrap();
    std::fs::copy(&known.debug, files.join("libhot.debug")).unwrap();
    let server = Server::start(&files, dir.path()).await;
    let mut config = config(&dir.path().join("data"));
    config.debuginfo.debuginfod = vec![format!("http://{}/", server.addr).parse().unwrap()];
    let running = Collector::start(config).await.unwrap();
    let ids = [store(&running, &known.profile()).await, store(&running, &unknown.profile()).await];
    let all = (0..6).map(|n| download(&running, &ids[n % 2]));
    let all = futures::future::join_all(all).await;
    for (n, bytes) in all.into_iter().enumerate() {
        assert_eq!(names(&bytes.unwrap()).len(), if n % 2 == 0 { 2 } else { 0 });
    }
    assert_eq!(server.requests().await, 2);
    for id in &ids {
        download(&running, id).await.unwrap();
    }
    assert_eq!(server.requests().await, 2);
    assert!(
        (metric(running.http_addr, "gannet_collector_debuginfo_server_requests_total").await - 2.0).abs()
            < 0.1
    );
    let list = client(&running).await.list_debug_info(ListDebugInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(list.files.iter().map(|file| file.origin.as_str()).collect::<Vec<_>>(), ["debuginfod"]);
    // A file that comes later is used at once.
    upload(&running, &unknown.build_id, &std::fs::read(&unknown.debug).unwrap()).await.unwrap();
    assert_eq!(names(&download(&running, &ids[1]).await.unwrap()).len(), 2);
    running.shutdown().await;
}

/// Checks that a file that went for lack of room is fetched again for the next frame without a name.
#[tokio::test]
async fn a_file_that_lost_its_room_is_fetched_again() {
    let (first, second) = (Stripped::build(Kind::Library), Stripped::build(Kind::Pie));
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("files");
    std::fs::create_dir(&files).unwrap();
    for (name, one) in [("first.debug", &first), ("second.debug", &second)] {
        std::fs::copy(&one.debug, files.join(name)).unwrap();
    }
    let server = Server::start(&files, dir.path()).await;
    let mut config = config(&dir.path().join("data"));
    config.debuginfo.debuginfod = vec![format!("http://{}/", server.addr).parse().unwrap()];
    // Room for either of them.
    let bytes = [&first, &second].map(|one| std::fs::metadata(&one.debug).unwrap().len());
    config.debuginfo.debuginfo_bytes = gannet_base::ByteSize(bytes[0].max(bytes[1]));
    let running = Collector::start(config).await.unwrap();
    for one in [&first, &second] {
        let id = store(&running, &one.profile()).await;
        assert_eq!(names(&download(&running, &id).await.unwrap()).len(), 2);
    }
    // The next instruction of each function, whose name is not in the cache.
    let mut later = first.profile();
    later.location.iter_mut().for_each(|location| location.address += 1);
    let id = store(&running, &later).await;
    assert_eq!(names(&download(&running, &id).await.unwrap()).len(), 2);
    assert_eq!(server.requests().await, 3);
    running.shutdown().await;
}

/// Checks that a server that lies, or sends too much, names nothing and delays nothing for long.
#[tokio::test]
async fn a_lying_debuginfod_names_nothing() {
    let stripped = Stripped::build(Kind::Pie);
    let other = std::fs::read(Stripped::build(Kind::Library).whole).unwrap();
    let length = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", other.len());
    let answers = [
        [length.as_bytes(), &other].concat(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort".to_vec(),
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n".to_vec(),
        b"no HTTP\r\n\r\n".to_vec(),
    ];
    for answer in answers {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let shown = String::from_utf8_lossy(&answer[..60.min(answer.len())]).into_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
                let _ = std::io::Write::write_all(&mut stream, &answer);
            }
        });
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        config.debuginfo.debuginfod = vec![format!("http://{addr}").parse().unwrap()];
        let running = Collector::start(config).await.unwrap();
        let profile = stripped.profile();
        let id = store(&running, &profile).await;
        assert_eq!(download(&running, &id).await.unwrap(), pprof::encode(&profile), "{shown}");
        let list =
            client(&running).await.list_debug_info(ListDebugInfoRequest {}).await.unwrap().into_inner();
        assert_eq!(list.files, [], "{shown}");
        running.shutdown().await;
    }
}

/// Returns offset and size of a section, and the offset of its header.
fn section(path: &Path, name: &str) -> (usize, usize, usize) {
    let output = Command::new("readelf").args(["-SW"]).arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let at = text.split_once("starting at offset 0x").unwrap().1.split(':').next().unwrap();
    let headers = usize::from_str_radix(at, 16).unwrap();
    let line = text.lines().find(|line| line.contains(&format!(" {name} "))).unwrap();
    let (number, rest) = line.trim().trim_start_matches('[').split_once(']').unwrap();
    let words: Vec<&str> = rest.split_whitespace().collect();
    let hex = |text: &str| usize::from_str_radix(text, 16).unwrap();
    (hex(words[3]), hex(words[4]), headers + 64 * number.trim().parse::<usize>().unwrap())
}

#[tokio::test]
async fn useless_and_hostile_files_are_refused() {
    let stripped = Stripped::build(Kind::Pie);
    let dir = tempfile::tempdir().unwrap();
    let running = Collector::start(config_with(dir.path(), |config| {
        config.debuginfo.debuginfo_file_bytes = gannet_base::ByteSize(1 << 20);
    }))
    .await
    .unwrap();
    let whole = std::fs::read(&stripped.whole).unwrap();
    let id = stripped.build_id.as_str();
    let path = |name: &str| stripped.directory.path().join(name);

    let packed = path("packed");
    tool(Command::new("objcopy").arg("--compress-debug-sections=zlib").args([&stripped.whole, &packed]));
    let mut bomb = std::fs::read(&packed).unwrap();
    bomb[section(&packed, ".debug_info").0 + 8..][..8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    let mut symbols = whole.clone();
    // The size in the section header: 2^32 symbols.
    symbols[section(&stripped.whole, ".symtab").2 + 32..][..8].copy_from_slice(&(24_u64 << 32).to_le_bytes());
    let anonymous = path("anonymous");
    tool(
        Command::new("gcc")
            .args(["-g", "-Wl,--build-id=none", "-nostdlib", "-shared", "-x", "c", "/dev/null", "-o"])
            .arg(&anonymous),
    );
    let other = "00".repeat(20);
    let large = vec![0; (1 << 20) + 1];
    let cases: [(&str, &str, &[u8], Code, &str); 9] = [
        ("text", id, b"#!/bin/sh\n", Code::InvalidArgument, "not an ELF file"),
        ("other build id", &other, &whole, Code::InvalidArgument, &format!("build id {id}, not {other}")),
        ("no build id", id, &std::fs::read(&anonymous).unwrap(), Code::InvalidArgument, "--build-id"),
        ("stripped", id, &std::fs::read(&stripped.program).unwrap(), Code::InvalidArgument, "before `strip`"),
        ("cut", id, &whole[..whole.len() - 4000], Code::InvalidArgument, "the file"),
        ("bomb", id, &bomb, Code::InvalidArgument, "after decompression"),
        ("symbols", id, &symbols, Code::InvalidArgument, "section .symtab claims 103079215104 bytes"),
        ("large", id, &large, Code::ResourceExhausted, "--debuginfo-file-bytes"),
        ("path", "../../../etc", &whole, Code::InvalidArgument, "build_id: give"),
    ];
    for (name, build_id, bytes, code, text) in cases {
        let status = upload(&running, build_id, bytes).await.unwrap_err();
        assert_eq!(status.code(), code, "{name}: {status}");
        assert!(status.message().contains(text), "{name}: {status}");
    }
    // Messages that disagree with the begin.
    let more = [messages(id, &whole), messages(id, &whole).split_off(1)].concat();
    let fewer = messages(id, &whole)[..1].to_vec();
    let headless = messages(id, &whole).split_off(1);
    let twice = [messages(id, &whole), messages(id, &whole)].concat();
    for (name, messages, text) in [
        ("more", more, "more than"),
        ("fewer", fewer, "ends"),
        ("headless", headless, "begin:"),
        ("twice", twice, "begin:"),
        ("nothing", vec![UploadDebugInfoRequest { message: None }], "message:"),
    ] {
        let status = client(&running).await.upload_debug_info(iter(messages)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status}");
        assert!(status.message().contains(text), "{name}: {status}");
    }
    let list = client(&running).await.list_debug_info(ListDebugInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(list.files, []);
    let incoming = std::fs::read_dir(dir.path().join("debuginfo/incoming")).map_or(0, Iterator::count);
    assert_eq!(incoming, 0, "a refused file stays on the disk");
    running.shutdown().await;
}

#[tokio::test]
async fn the_least_used_files_go_beyond_the_limit() {
    let all: Vec<Stripped> = [Kind::Pie, Kind::Fixed, Kind::Library].map(Stripped::build).into();
    let bytes: Vec<Vec<u8>> = all.iter().map(|one| std::fs::read(&one.debug).unwrap()).collect();
    let dir = tempfile::tempdir().unwrap();
    let limit = bytes.iter().map(Vec::len).sum::<usize>() as u64 - 1;
    let mut config = config(dir.path());
    config.debuginfo.debuginfo_bytes = gannet_base::ByteSize(limit);
    let running = Collector::start(config).await.unwrap();
    for (one, bytes) in all.iter().zip(&bytes).take(2) {
        upload(&running, &one.build_id, bytes).await.unwrap();
    }
    // The first one is used.
    let id = store(&running, &all[0].profile()).await;
    assert_eq!(names(&download(&running, &id).await.unwrap()).len(), 2);
    upload(&running, &all[2].build_id, &bytes[2]).await.unwrap();
    let list = client(&running).await.list_debug_info(ListDebugInfoRequest {}).await.unwrap().into_inner();
    let mut kept = [&all[0].build_id, &all[2].build_id];
    kept.sort();
    assert_eq!(list.files.iter().map(|file| &file.build_id).collect::<Vec<_>>(), kept);
    assert!(list.bytes <= limit);
    running.shutdown().await;
}
