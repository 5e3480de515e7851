//! Names of stripped programs on the real kernel, as root: the agent records them without names, and a later upload names what is
//! stored.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on fails at once"
)]

use std::{
    path::Path,
    process::{Child, Command, Stdio},
};

use gannet_e2e::{Agent, Collector, binary, eventually, rule};

const C: &str = r"
static volatile unsigned sink;
static inline __attribute__((always_inline)) void multiply(unsigned n) {
	for (unsigned i = 0; i < n; i++) sink = sink * 31 + i;
}
static __attribute__((noinline)) void price_orders(unsigned n) {
	multiply(n);
	sink++;
}
int main(void) { for (;;) price_orders(100000); }
";
const CPP: &str = r"
namespace shop {
static volatile unsigned sink;
template <typename T> static inline __attribute__((always_inline)) void multiply(T n) {
	for (T i = 0; i < n; i++) sink = sink * 31 + i;
}
struct Cart {
	__attribute__((noinline)) void price(unsigned n) { multiply<unsigned>(n); sink = sink + 1; }
};
}
int main() { shop::Cart cart; for (;;) cart.price(100000); }
";

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn tool(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Builds a program, keeps its debug file as `NAME.debug`, and strips it.
fn build(directory: &Path, name: &str, source: &str, compiler: &str, flags: &[&str]) {
    let path = |suffix: &str| directory.join(format!("{name}{suffix}"));
    std::fs::write(path(".src"), source).unwrap();
    let language = if compiler == "g++" { "c++" } else { "c" };
    tool(Command::new(compiler).args(["-g", "-O2", "-Wl,--build-id", "-x", language]).args(flags).args([
        path(".src"),
        "-o".into(),
        path(""),
    ]));
    tool(Command::new("objcopy").arg("--only-keep-debug").args([path(""), path(".debug")]));
    tool(Command::new("strip").arg(path("")));
}

#[tokio::test]
async fn an_upload_names_stored_profiles_of_stripped_programs() {
    let directory = tempfile::tempdir().unwrap();
    build(directory.path(), "strippedc", C, "gcc", &["-pie", "-fPIE"]);
    build(directory.path(), "strippedcpp", CPP, "g++", &["-no-pie", "-fno-pie"]);
    let collector = Collector::start().await;
    let agent = Agent::start("alpha", &collector.url(), &["--window=1s"]);
    agent.connected(&collector).await;
    collector.set_rules(vec![rule("c", "strippedc", 199), rule("cpp", "strippedcpp", 199)]).await.unwrap();
    let cases = [
        ("strippedc", ["main", "price_orders", "multiply"]),
        ("strippedcpp", ["main", "shop::Cart::price(unsigned int)", "multiply<unsigned int>"]),
    ];
    for (name, expected) in cases {
        let query = format!("{{service_name={name:?}}}");
        let program = Command::new(directory.path().join(name)).stdin(Stdio::null()).spawn().unwrap();
        let program = Killed(program);
        eventually("a profile of the program", async || collector.profiles(&query).await.pop()).await;
        drop(program);
        let before = collector.flame_graph(&query).await;
        assert!(before.total > 0);
        let has = |graph: &gannet_proto::query::FlameGraphResponse, name: &str| {
            graph.nodes.iter().any(|node| node.name.starts_with(name))
        };
        assert!(expected.iter().all(|name| !has(&before, name)), "{:?}", before.nodes);

        let debug = directory.path().join(format!("{name}.debug"));
        let upload = Command::new(binary("gannetctl"))
            .args(["--endpoint", &collector.url(), "debuginfo", "upload"])
            .arg(&debug)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&upload.stdout).into_owned();
        assert!(upload.status.success() && text.contains("uploaded"), "{upload:?}");
        let after = collector.flame_graph(&query).await;
        let names: Vec<&str> = after.nodes.iter().map(|node| node.name.as_str()).collect();
        assert!(expected.iter().all(|name| has(&after, name)), "{names:?}");
        assert_eq!(after.total, before.total);
        eprintln!("{name}: {} frames before, {} after: {names:?}", before.nodes.len(), after.nodes.len());
    }
}

/// Checks that the agent uploads the debug information of a program that it samples, once, and that the collector then names a
/// stripped copy of it.
#[tokio::test]
async fn the_agents_upload_names_a_stripped_copy() {
    let directory = tempfile::tempdir().unwrap();
    build(directory.path(), "copystripped", C, "gcc", &["-pie", "-fPIE"]);
    // The same build with everything that `strip` removed.
    let whole = directory.path().join("copywhole");
    tool(Command::new("gcc").args(["-g", "-O2", "-Wl,--build-id", "-x", "c", "-pie", "-fPIE"]).args([
        directory.path().join("copystripped.src"),
        "-o".into(),
        whole.clone(),
    ]));
    let collector = Collector::start().await;
    let flags = ["--window=1s", "--debuginfo-upload", "--debuginfo-upload-rate=1MiB"];
    let agent = Agent::start("alpha", &collector.url(), &flags);
    agent.connected(&collector).await;
    collector.set_rules(vec![rule("a", "copywhole", 199), rule("b", "copystripped", 199)]).await.unwrap();
    let list = || {
        let output = Command::new(binary("gannetctl"))
            .args(["--endpoint", &collector.url(), "debuginfo", "list", "-o", "json"])
            .output()
            .unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["files"]
            .as_array()
            .unwrap()
            .clone()
    };
    assert!(list().is_empty());
    let program = Killed(Command::new(&whole).stdin(Stdio::null()).spawn().unwrap());
    let size = std::fs::metadata(&whole).unwrap().len();
    eventually("the agent uploads the file", async || {
        list().iter().any(|file| file["bytes"] == size && file["origin"] == "agent").then_some(())
    })
    .await;
    drop(program);
    let copy = directory.path().join("copystripped");
    let program = Killed(Command::new(&copy).stdin(Stdio::null()).spawn().unwrap());
    let query = "{service_name=\"copystripped\"}";
    eventually("a profile of the copy", async || collector.profiles(query).await.pop()).await;
    drop(program);
    let graph = collector.flame_graph(query).await;
    let names: Vec<&str> = graph.nodes.iter().map(|node| node.name.as_str()).collect();
    assert!(["main", "price_orders", "multiply"].iter().all(|name| names.contains(name)), "{names:?}");
}
