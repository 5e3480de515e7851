//! A collector, agents and the sample program, each as a process with its own ports and directories.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
};

use gannet_proto::{
    control::{
        Capture, GetRolloutRequest, Match, Node, Rollout, Rule, SetTriggersRequest, SetTriggersResponse,
        fleet_service_client::FleetServiceClient, trigger_service_client::TriggerServiceClient,
    },
    query::{
        FlameGraphRequest, FlameGraphResponse, ListProfilesRequest, ProfileInfo, Selection,
        query_service_client::QueryServiceClient,
    },
};
use tempfile::TempDir;
use tonic::{Status, transport::Channel};

use crate::{Program, eventually};

/// Returns a free port. A program keeps its port over restarts, so the test chooses it.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

fn strings<const N: usize>(args: [&str; N]) -> Vec<String> {
    args.map(str::to_owned).to_vec()
}

/// A collector process with its store.
pub struct Collector {
    // Before the directory, so that dropping it can still print its log.
    program: Option<Program>,
    directory: TempDir,
    grpc: u16,
    http: u16,
    more: Vec<String>,
}

impl Collector {
    /// Starts a collector on an empty store and waits until it answers.
    pub async fn start() -> Self {
        let mut collector = Self::prepare();
        collector.up().await;
        collector
    }

    /// Reserves ports and a directory; [`Self::up`] starts the process.
    pub fn prepare() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        Self { program: None, directory, grpc: free_port(), http: free_port(), more: Vec::new() }
    }

    /// Adds flags of the process, before [`Self::up`].
    #[must_use]
    pub fn with(mut self, flags: &[&str]) -> Self {
        self.more.extend(flags.iter().map(|flag| (*flag).to_owned()));
        self
    }

    /// Starts the process on its former store and waits until it answers.
    pub async fn up(&mut self) {
        let mut args = vec![
            format!("--data={}", self.data().display()),
            format!("--grpc-listen=127.0.0.1:{}", self.grpc),
            format!("--http-listen=127.0.0.1:{}", self.http),
        ];
        args.extend(self.more.iter().cloned());
        self.program = Some(Program::start("gannet-collector", &args, self.directory.path()));
        eventually("the collector answers", async || self.nodes().await.ok()).await;
    }

    /// Returns the process; panics if it was never started.
    pub fn program(&mut self) -> &mut Program {
        self.program.as_mut().expect("the collector was started")
    }

    /// Returns the directory of the store.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Returns the URL for `--endpoint`.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.grpc)
    }

    /// Returns the address of the page and the metrics.
    pub fn pages(&self) -> String {
        format!("127.0.0.1:{}", self.http)
    }

    /// Returns a connection that survives restarts.
    pub fn channel(&self) -> Channel {
        Channel::from_shared(self.url()).expect("an address").connect_lazy()
    }

    /// Lists all nodes that the collector knows.
    pub async fn nodes(&self) -> Result<Vec<Node>, Status> {
        let mut client = FleetServiceClient::new(self.channel());
        Ok(client.list_nodes(gannet_proto::control::ListNodesRequest {}).await?.into_inner().nodes)
    }

    /// Returns one node, if the collector knows it.
    pub async fn node(&self, name: &str) -> Option<Node> {
        self.nodes().await.ok()?.into_iter().find(|node| node.name == name)
    }

    /// Replaces the rules of the default scope.
    pub async fn set_rules(&self, rules: Vec<Rule>) -> Result<SetTriggersResponse, Status> {
        self.set_triggers(SetTriggersRequest { rules, ..Default::default() }).await
    }

    /// Sends the request as it is.
    pub async fn set_triggers(&self, request: SetTriggersRequest) -> Result<SetTriggersResponse, Status> {
        TriggerServiceClient::new(self.channel()).set_triggers(request).await.map(tonic::Response::into_inner)
    }

    /// Returns the state of a revision on every node.
    pub async fn rollout(&self, revision: u64) -> Rollout {
        let request = GetRolloutRequest { revision };
        TriggerServiceClient::new(self.channel())
            .get_rollout(request)
            .await
            .expect("the rollout")
            .into_inner()
    }

    /// Returns all stored profiles of a query.
    pub async fn profiles(&self, query: &str) -> Vec<ProfileInfo> {
        let mut client = QueryServiceClient::new(self.channel());
        let (mut all, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListProfilesRequest { selection: Some(selection(query)), limit: 1000, page_token };
            let page = client.list_profiles(request).await.expect("the profiles are listed").into_inner();
            all.extend(page.profiles);
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return all;
            }
        }
    }

    /// Returns the merged profile of a query as a flame graph.
    pub async fn flame_graph(&self, query: &str) -> FlameGraphResponse {
        let request =
            FlameGraphRequest { selection: Some(selection(query)), flat: true, ..Default::default() };
        QueryServiceClient::new(self.channel())
            .flame_graph(request)
            .await
            .expect("a flame graph")
            .into_inner()
    }
}

/// Selects the profiles of a query from the last hour.
pub fn selection(query: &str) -> Selection {
    Selection { query: query.to_owned(), ..Default::default() }
}

/// An agent process with its state directory.
pub struct Agent {
    program: Option<Program>,
    directory: TempDir,
    state: PathBuf,
    node: String,
    args: Vec<String>,
    debug: u16,
    probes: u16,
}

impl Agent {
    /// Starts an agent as node `node` that dials `url`, with more flags.
    pub fn start(node: &str, url: &str, more: &[&str]) -> Self {
        let mut agent = Self::prepare(node, url, more);
        agent.up();
        agent
    }

    /// Reserves ports and a state directory; [`Self::up`] starts the process.
    pub fn prepare(node: &str, url: &str, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let state = directory.path().join("state");
        Self::with_state(node, url, more, directory, state)
    }

    /// Starts an agent with the given state directory.
    pub fn start_in(state: PathBuf, node: &str, url: &str, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut agent = Self::with_state(node, url, more, directory, state);
        agent.up();
        agent
    }

    fn with_state(node: &str, url: &str, more: &[&str], directory: TempDir, state: PathBuf) -> Self {
        let (debug, probes) = (free_port(), free_port());
        let mut args = strings(["run", "--pod-source=none"]);
        args.extend([
            format!("--endpoint={url}"),
            format!("--node={node}"),
            format!("--state-dir={}", state.display()),
            format!("--debug-listen=127.0.0.1:{debug}"),
            format!("--http-listen=127.0.0.1:{probes}"),
        ]);
        args.extend(more.iter().map(|&arg| arg.to_owned()));
        Self { program: None, directory, state, node: node.to_owned(), args, debug, probes }
    }

    /// Starts the process with its former state.
    pub fn up(&mut self) {
        self.program = Some(Program::start("gannet-agent", &self.args, self.directory.path()));
    }

    /// Returns the process; panics if it was never started.
    pub fn program(&mut self) -> &mut Program {
        self.program.as_mut().expect("the agent was started")
    }

    /// Returns the name of its node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Returns the state directory: spool, sequence, last good rules.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Returns `HOST:PORT` of the debug page.
    pub fn debug(&self) -> String {
        format!("127.0.0.1:{}", self.debug)
    }

    /// Returns `HOST:PORT` of probes and metrics.
    pub fn probes(&self) -> String {
        format!("127.0.0.1:{}", self.probes)
    }

    /// Waits until the collector lists it as connected.
    pub async fn connected(&self, collector: &Collector) {
        eventually("the agent is connected", async || {
            collector.node(&self.node).await.filter(|node| node.connected)
        })
        .await;
    }
}

/// A process of the sample program.
pub struct Sample {
    program: Program,
    directory: TempDir,
}

impl Sample {
    /// Starts the program with a CPU time of `load` percent of one core.
    #[track_caller]
    pub fn start(load: u32) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let program = Program::start("webshop", &["--load".to_owned(), load.to_string()], directory.path());
        Self { program, directory }
    }

    /// Returns the process; panics if it was never started.
    pub fn program(&mut self) -> &mut Program {
        &mut self.program
    }

    /// Ends the program, and returns its CPU time by the kernel's account, in nanoseconds.
    #[track_caller]
    pub fn finish(mut self) -> u64 {
        assert!(self.program.terminate().success(), "the sample program ends well");
        let line: serde_json::Value = serde_json::from_str(&self.program.log()).expect("its report");
        drop(self.directory);
        line["cpu_ns"].as_u64().expect("its CPU time")
    }
}

/// Builds a rule that always samples the processes with the command name `comm`.
pub fn rule(id: &str, comm: &str, hz: u32) -> Rule {
    Rule {
        id: id.to_owned(),
        r#match: Some(Match { comm: vec![comm.to_owned()], ..Default::default() }),
        capture: Some(Capture { hz, ..Default::default() }),
        // A rule that always samples needs a lifetime.
        lifetime: Some(gannet_proto::control::Lifetime {
            ttl: Some("3600s".parse().expect("a duration")),
            not_before: None,
        }),
        ..Default::default()
    }
}
