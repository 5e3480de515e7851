//! What `gannet-agent run` is told: by flags, by the environment (`GANNET_…`), by a file. A flag goes before the
//! environment, the environment before the file, the file before the default.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::Args;
use gannet_proto::{
    connect::Dial,
    ports,
    rules::{Caps, Pattern},
    selector::LabelSelector,
};
use serde::{Deserialize, Deserializer};

use crate::{
    governor::Budgets,
    kernel::{MAX_CGROUP_PATH, MAX_COMM, default_ring_bytes},
    pods::{LabelOptions, PATIENCE, SourceKind, SourceOptions, check_address},
    rules::{CAPTURE_SLOTS, Deny, RULE_SLOTS},
};

/// Where Kubernetes puts a pod's token and its cluster's authority.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// Where the kubelet streams pods: since 1.36, and as it was planned first.
const PODINFO_SOCKETS: [&str; 2] =
    ["/var/lib/kubelet/pods-api/pods-api.sock", "/var/lib/kubelet/pods/kubelet.sock"];
/// A series has at most thirty labels; the agent's own and a rule's need room too.
const MOST_POD_LABELS: usize = 10;

/// Flags of `run`. Each is a key of the file too, with `_` for `-`.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunArgs {
    /// A YAML file with these options as keys (`state_dir: /var/lib/gannet`)
    #[arg(long, env = "GANNET_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Where profiles go and rules come from: https://HOST:4100; without it profiles stay in the spool
    #[arg(long, env = "GANNET_COLLECTOR", value_name = "URL")]
    pub collector: Option<String>,
    /// This node's name [default: the host name]
    #[arg(long, env = "GANNET_NODE", value_name = "NAME")]
    pub node: Option<String>,
    /// A label of this node, for rules that select nodes (repeatable)
    #[arg(long = "label", env = "GANNET_LABEL", value_name = "NAME=VALUE", value_delimiter = ',')]
    pub label: Vec<String>,
    /// Rule files of this node; they are read again when they change (repeatable)
    #[arg(long, env = "GANNET_RULES", value_name = "FILE", value_delimiter = ',', num_args = 1..)]
    pub rules: Vec<PathBuf>,
    /// Where the spool and the last good rules are kept [default: /var/lib/gannet]
    #[arg(long, env = "GANNET_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The node's page, on loopback only [default: 127.0.0.1:6060]
    #[arg(long, env = "GANNET_DEBUG_LISTEN", value_name = "ADDRESS")]
    pub debug_listen: Option<SocketAddr>,
    /// Probes and metrics [default: 0.0.0.0:8081]
    #[arg(long, env = "GANNET_LISTEN", value_name = "ADDRESS")]
    pub listen: Option<SocketAddr>,
    /// Where pod metadata comes from [default: auto]
    #[arg(long, env = "GANNET_KUBELET", value_name = "SOURCE")]
    pub kubelet: Option<Kubelet>,
    /// The kubelet's address, as status.hostIP gives it: HOST, HOST:PORT or https://HOST:PORT [default: 127.0.0.1:10250]
    #[arg(long, env = "GANNET_KUBELET_ADDRESS", value_name = "ADDRESS")]
    pub kubelet_address: Option<String>,
    /// Whose certificate the kubelet must have (PEM) [default: the service account's ca.crt]
    #[arg(long, env = "GANNET_KUBELET_CA", value_name = "FILE")]
    pub kubelet_ca: Option<PathBuf>,
    /// The kubelet's own certificate, where it is self-signed (PEM)
    #[arg(long, env = "GANNET_KUBELET_CERTIFICATE", value_name = "FILE")]
    pub kubelet_certificate: Option<PathBuf>,
    /// Take any certificate for the kubelet's
    #[arg(long, env = "GANNET_KUBELET_INSECURE")]
    pub kubelet_insecure: bool,
    /// A file with the bearer token for the kubelet, read again for each request [default: the service account's token]
    #[arg(long, env = "GANNET_KUBELET_TOKEN_FILE", value_name = "FILE")]
    pub kubelet_token_file: Option<PathBuf>,
    /// The socket at which the kubelet streams pods (Kubernetes 1.36 and later) [default: the usual ones]
    #[arg(long, env = "GANNET_PODINFO_SOCKET", value_name = "FILE")]
    pub podinfo_socket: Option<PathBuf>,
    /// A label of pods that becomes a label of their profiles (repeatable)
    #[arg(long = "pod-label", env = "GANNET_POD_LABEL", value_name = "KEY", value_delimiter = ',')]
    pub pod_label: Vec<String>,
    /// The cluster's name, a label of all profiles
    #[arg(long, env = "GANNET_CLUSTER", value_name = "NAME")]
    pub cluster: Option<String>,
    /// The highest rate that a rule may ask for, samples a second and CPU [default: 1000]
    #[arg(long, env = "GANNET_HZ_MAX", value_name = "HZ")]
    pub hz_max: Option<u32>,
    /// Never sample these commands, whatever rules ask for: exact, or a prefix with * at its end (repeatable)
    #[arg(long, env = "GANNET_DENY_COMM", value_name = "PATTERN", value_delimiter = ',')]
    pub deny_comm: Vec<String>,
    /// Never sample what is in these control groups: a path, exact, or a prefix with * at its end (repeatable)
    #[arg(long, env = "GANNET_DENY_CGROUP", value_name = "PATH", value_delimiter = ',')]
    pub deny_cgroup: Vec<String>,
    /// Never sample processes of these users (repeatable)
    #[arg(long, env = "GANNET_DENY_UID", value_name = "UID", value_delimiter = ',')]
    pub deny_uid: Vec<u32>,
    /// Of one core, for the agent's threads and BPF programs together: 0.05 or 5%; over it rates are lowered, then captures
    /// refused [default: none]
    #[arg(long, env = "GANNET_CPU_BUDGET", value_name = "SHARE")]
    pub cpu_budget: Option<Share>,
    /// Of the agent's memory; over it rates are lowered, then captures refused [default: none]
    #[arg(long, env = "GANNET_MEMORY_BUDGET", value_name = "BYTES")]
    pub memory_budget: Option<Bytes>,
    /// How long a window is, 1s to 10m [default: 10s]
    #[arg(long, env = "GANNET_WINDOW", value_name = "TIME")]
    pub window: Option<Span>,
    /// Of the ring between kernel and agent; rounded up to a power of two [default: 1MiB for each CPU, 2MiB to 16MiB]
    #[arg(long, env = "GANNET_RING_BYTES", value_name = "BYTES")]
    pub ring_bytes: Option<Bytes>,
    /// Of the unwind tables in the kernel [default: 16MiB]
    #[arg(long, env = "GANNET_TABLE_BYTES", value_name = "BYTES")]
    pub table_bytes: Option<Bytes>,
    /// Processes that can be sampled or known at one time [default: 16384]
    #[arg(long, env = "GANNET_PROCESSES", value_name = "N")]
    pub processes: Option<u32>,
    /// Hear of processes that start, change and end at once; false: they are looked for every two seconds, and short ones
    /// are missed [default: true]
    #[arg(long, env = "GANNET_LIFECYCLE", value_name = "BOOL")]
    pub lifecycle: Option<bool>,
    /// What the spool may keep on disk [default: 256MiB]
    #[arg(long, env = "GANNET_SPOOL_BYTES", value_name = "BYTES")]
    pub spool_bytes: Option<Bytes>,
    /// How long the spool keeps what the collector does not take [default: 24h]
    #[arg(long, env = "GANNET_SPOOL_AGE", value_name = "TIME")]
    pub spool_age: Option<Span>,
    /// Speak plaintext to a collector that is not on loopback
    #[arg(long, env = "GANNET_INSECURE")]
    pub insecure: bool,
    /// Whose certificate the collector must have (PEM) [default: the system's authorities]
    #[arg(long, env = "GANNET_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// The agent's own certificate (PEM)
    #[arg(long, env = "GANNET_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The key of --tls-cert (PEM)
    #[arg(long, env = "GANNET_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// A file with a bearer token, read again at each call
    #[arg(long, env = "GANNET_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

/// Where pod metadata comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kubelet {
    /// The first that is there.
    #[default]
    Auto,
    /// The kubelet's PodInfo socket.
    Podinfo,
    /// The kubelet's HTTPS endpoint.
    Kubelet,
    /// The API server.
    Apiserver,
    /// Nowhere.
    None,
}

/// A number of bytes: `65536`, `64KiB`, `16MiB`, `2GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// A share of one core: `0.05`, `5%`; more than one core is possible.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share(pub f64);

/// A length of time: `10s`, `2m`, `1h 30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

/// What was told, complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// See [`RunArgs`].
    pub dial: Option<Dial>,
    /// See [`RunArgs`].
    pub node: String,
    /// See [`RunArgs`].
    pub labels: BTreeMap<String, String>,
    /// See [`RunArgs`].
    pub rules: Vec<PathBuf>,
    /// See [`RunArgs`].
    pub state_dir: PathBuf,
    /// See [`RunArgs`].
    pub debug_listen: SocketAddr,
    /// See [`RunArgs`].
    pub listen: SocketAddr,
    /// Where pod metadata comes from; none: from nowhere.
    pub pods: Option<SourceOptions>,
    /// What pods are called in profiles.
    pub pod_labels: LabelOptions,
    /// What rules may ask for here.
    pub caps: Caps,
    /// What is never sampled here.
    pub deny: Deny,
    /// What the agent may use.
    pub budgets: Budgets,
    /// See [`RunArgs`].
    pub window: Duration,
    /// See [`RunArgs`].
    pub ring_bytes: u32,
    /// See [`RunArgs`].
    pub table_bytes: u32,
    /// See [`RunArgs`].
    pub processes: u32,
    /// See [`RunArgs`].
    pub lifecycle: bool,
    /// See [`RunArgs`].
    pub spool_bytes: u64,
    /// See [`RunArgs`].
    pub spool_age: Duration,
}

/// What is wrong with what was told.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("--config {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("--config {}: {reason}", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// What and where.
        reason: String,
    },
    /// A value cannot be.
    #[error("--{option} {value}: {cure}")]
    Value {
        /// Its name.
        option: &'static str,
        /// What was given.
        value: String,
        /// What to give instead.
        cure: &'static str,
    },
}

impl RunArgs {
    /// Reads the file, if there is one, and completes what was told.
    pub fn complete(self) -> Result<Config, ConfigError> {
        let file = match &self.config {
            Some(path) => read(path)?,
            None => Self::default(),
        };
        self.over(file).check()
    }

    /// What is given here, and for what is not, what `file` says.
    fn over(self, file: Self) -> Self {
        // In full, so that a new option cannot be forgotten.
        let Self {
            config,
            collector,
            node,
            label,
            rules,
            state_dir,
            debug_listen,
            listen,
            kubelet,
            kubelet_address,
            kubelet_ca,
            kubelet_certificate,
            kubelet_insecure,
            kubelet_token_file,
            podinfo_socket,
            pod_label,
            cluster,
            hz_max,
            deny_comm,
            deny_cgroup,
            deny_uid,
            cpu_budget,
            memory_budget,
            window,
            ring_bytes,
            table_bytes,
            processes,
            lifecycle,
            spool_bytes,
            spool_age,
            insecure,
            tls_ca,
            tls_cert,
            tls_key,
            token_file,
        } = self;
        Self {
            config,
            collector: collector.or(file.collector),
            node: node.or(file.node),
            label: if label.is_empty() { file.label } else { label },
            rules: if rules.is_empty() { file.rules } else { rules },
            state_dir: state_dir.or(file.state_dir),
            debug_listen: debug_listen.or(file.debug_listen),
            listen: listen.or(file.listen),
            kubelet: kubelet.or(file.kubelet),
            kubelet_address: kubelet_address.or(file.kubelet_address),
            kubelet_ca: kubelet_ca.or(file.kubelet_ca),
            kubelet_certificate: kubelet_certificate.or(file.kubelet_certificate),
            kubelet_insecure: kubelet_insecure || file.kubelet_insecure,
            kubelet_token_file: kubelet_token_file.or(file.kubelet_token_file),
            podinfo_socket: podinfo_socket.or(file.podinfo_socket),
            pod_label: if pod_label.is_empty() { file.pod_label } else { pod_label },
            cluster: cluster.or(file.cluster),
            hz_max: hz_max.or(file.hz_max),
            // What the file denies stays denied.
            deny_comm: [deny_comm, file.deny_comm].concat(),
            deny_cgroup: [deny_cgroup, file.deny_cgroup].concat(),
            deny_uid: [deny_uid, file.deny_uid].concat(),
            cpu_budget: cpu_budget.or(file.cpu_budget),
            memory_budget: memory_budget.or(file.memory_budget),
            window: window.or(file.window),
            ring_bytes: ring_bytes.or(file.ring_bytes),
            table_bytes: table_bytes.or(file.table_bytes),
            processes: processes.or(file.processes),
            lifecycle: lifecycle.or(file.lifecycle),
            spool_bytes: spool_bytes.or(file.spool_bytes),
            spool_age: spool_age.or(file.spool_age),
            insecure: insecure || file.insecure,
            tls_ca: tls_ca.or(file.tls_ca),
            tls_cert: tls_cert.or(file.tls_cert),
            tls_key: tls_key.or(file.tls_key),
            token_file: token_file.or(file.token_file),
        }
    }

    fn check(self) -> Result<Config, ConfigError> {
        let wrong = |option, value: &dyn fmt::Display, cure| {
            Err(ConfigError::Value { option, value: value.to_string(), cure })
        };
        let mut labels = BTreeMap::new();
        for label in &self.label {
            match label.split_once('=') {
                Some((name, value)) if !name.is_empty() => labels.insert(name.to_owned(), value.to_owned()),
                _ => return wrong("label", label, "write NAME=VALUE"),
            };
        }
        let debug_listen = self.debug_listen.unwrap_or_else(|| address(ports::AGENT_DEBUG));
        if !debug_listen.ip().is_loopback() {
            return wrong(
                "debug-listen",
                &debug_listen,
                "it shows too much for a network: give a loopback address and use kubectl port-forward",
            );
        }
        let window = self.window.map_or(Duration::from_secs(10), |span| span.0);
        if !(Duration::from_secs(1)..=Duration::from_secs(600)).contains(&window) {
            return wrong("window", &humantime::format_duration(window), "give 1s to 10m");
        }
        let hz_max = self.hz_max.unwrap_or(1000);
        if !(1..=1000).contains(&hz_max) {
            return wrong("hz-max", &hz_max, "give 1 to 1000");
        }
        let map_size = |option, given: Option<Bytes>, default: u64| {
            let bytes = given.map_or(default, |bytes| bytes.0);
            match u32::try_from(bytes) {
                Ok(size) if (128 << 10..=1 << 30).contains(&size) => Ok(size),
                _ => {
                    Err(ConfigError::Value { option, value: bytes.to_string(), cure: "give 128KiB to 1GiB" })
                }
            }
        };
        let deny = Deny {
            comm: patterns("deny-comm", &self.deny_comm, MAX_COMM, "")?,
            cgroup: patterns("deny-cgroup", &self.deny_cgroup, MAX_CGROUP_PATH, "/")?,
            uid: self.deny_uid,
            containers: BTreeSet::new(),
        };
        let processes = self.processes.unwrap_or(16_384);
        if !(64..=1 << 20).contains(&processes) {
            return wrong("processes", &processes, "give 64 to 1048576");
        }
        let node =
            self.node.unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
        if node.is_empty() || node.len() > 253 {
            return wrong("node", &node, "give a name of 1 to 253 bytes");
        }
        if self.pod_label.len() > MOST_POD_LABELS {
            let given = format!("({} of them)", self.pod_label.len());
            return wrong("pod-label", &given, "give at most 10: each makes more series");
        }
        if let Some(key) = self
            .pod_label
            .iter()
            .find(|key| key.contains(['=', '!', ' ', '(']) || LabelSelector::parse(key).is_err())
        {
            return wrong("pod-label", key, "give the key of a label, like app.kubernetes.io/version");
        }
        let cluster = self.cluster.unwrap_or_default();
        if cluster.len() > 253 {
            return wrong("cluster", &cluster, "give a name of at most 253 bytes");
        }
        let kubelet_address = self.kubelet_address.unwrap_or_else(|| "127.0.0.1:10250".into());
        if check_address(&kubelet_address).is_err() {
            let cure = "write HOST, HOST:PORT or https://HOST:PORT, IPv6 in brackets";
            return wrong("kubelet-address", &kubelet_address, cure);
        }
        let only = match self.kubelet.unwrap_or_default() {
            Kubelet::Auto | Kubelet::None => None,
            Kubelet::Podinfo => Some(SourceKind::PodInfo),
            Kubelet::Kubelet => Some(SourceKind::Kubelet),
            Kubelet::Apiserver => Some(SourceKind::ApiServer),
        };
        let pods = (self.kubelet != Some(Kubelet::None)).then(|| SourceOptions {
            only,
            node: node.clone(),
            podinfo_sockets: match self.podinfo_socket {
                Some(socket) => vec![socket],
                None => PODINFO_SOCKETS.iter().map(PathBuf::from).collect(),
            },
            kubelet_address,
            kubelet_ca: self.kubelet_ca.unwrap_or_else(|| Path::new(SERVICE_ACCOUNT).join("ca.crt")),
            kubelet_certificate: self.kubelet_certificate,
            kubelet_insecure: self.kubelet_insecure,
            token_file: self.kubelet_token_file.unwrap_or_else(|| Path::new(SERVICE_ACCOUNT).join("token")),
            patience: PATIENCE,
            apiserver: is_set("KUBERNETES_SERVICE_HOST") || is_set("KUBECONFIG"),
        });
        Ok(Config {
            dial: self.collector.map(|url| Dial {
                url,
                insecure: self.insecure,
                ca: self.tls_ca,
                cert: self.tls_cert,
                key: self.tls_key,
                token_file: self.token_file,
            }),
            node,
            labels,
            rules: self.rules,
            state_dir: self.state_dir.unwrap_or_else(|| "/var/lib/gannet".into()),
            debug_listen,
            listen: self.listen.unwrap_or_else(|| address(ports::AGENT_PROBES)),
            pods,
            pod_labels: LabelOptions { cluster, pod_labels: self.pod_label },
            caps: Caps {
                max_hz: hz_max,
                max_rules: RULE_SLOTS,
                max_concurrent: CAPTURE_SLOTS as u32,
                ..Caps::default()
            },
            deny,
            budgets: Budgets {
                cpu: self.cpu_budget.map(|share| share.0),
                memory_bytes: self.memory_budget.map(|bytes| bytes.0),
            },
            window,
            ring_bytes: map_size("ring-bytes", self.ring_bytes, default_ring_bytes().into())?,
            table_bytes: map_size("table-bytes", self.table_bytes, 16 << 20)?,
            processes,
            lifecycle: self.lifecycle.unwrap_or(true),
            spool_bytes: self.spool_bytes.map_or(256 << 20, |bytes| bytes.0),
            spool_age: self.spool_age.map_or(Duration::from_secs(24 * 3600), |span| span.0),
        })
    }
}

impl Config {
    /// The options in force, one to a line; paths of secrets, never secrets.
    pub fn lines(&self) -> String {
        let Self {
            dial,
            node,
            labels,
            rules,
            state_dir,
            debug_listen,
            listen,
            pods,
            pod_labels: LabelOptions { cluster, pod_labels },
            caps,
            deny,
            budgets,
            window,
            ring_bytes,
            table_bytes,
            processes,
            lifecycle,
            spool_bytes,
            spool_age,
        } = self;
        let dial = dial.clone().unwrap_or_default();
        let path = |path: &Option<PathBuf>| path.as_deref().unwrap_or(Path::new("")).display().to_string();
        let mut lines = vec![
            ("collector", dial.url.clone()),
            ("insecure", dial.insecure.to_string()),
            ("tls-ca", path(&dial.ca)),
            ("tls-cert", path(&dial.cert)),
            ("tls-key", path(&dial.key)),
            ("token-file", path(&dial.token_file)),
            ("node", node.clone()),
            ("state-dir", state_dir.display().to_string()),
            ("debug-listen", debug_listen.to_string()),
            ("listen", listen.to_string()),
            ("cluster", cluster.clone()),
            ("hz-max", caps.max_hz.to_string()),
            ("window", humantime::format_duration(*window).to_string()),
            ("ring-bytes", ring_bytes.to_string()),
            ("table-bytes", table_bytes.to_string()),
            ("processes", processes.to_string()),
            ("lifecycle", lifecycle.to_string()),
            ("spool-bytes", spool_bytes.to_string()),
            ("spool-age", humantime::format_duration(*spool_age).to_string()),
        ];
        match pods {
            None => lines.push(("kubelet", "none".into())),
            Some(SourceOptions {
                only,
                node: _,
                podinfo_sockets,
                kubelet_address,
                kubelet_ca,
                kubelet_certificate,
                kubelet_insecure,
                token_file,
                patience: _,
                apiserver: _,
            }) => {
                lines.extend([
                    ("kubelet", only.map_or("auto", SourceKind::as_str).to_owned()),
                    ("kubelet-address", kubelet_address.clone()),
                    ("kubelet-ca", kubelet_ca.display().to_string()),
                    ("kubelet-certificate", path(kubelet_certificate)),
                    ("kubelet-insecure", kubelet_insecure.to_string()),
                    ("kubelet-token-file", token_file.display().to_string()),
                ]);
                lines.extend(
                    podinfo_sockets.iter().map(|socket| ("podinfo-socket", socket.display().to_string())),
                );
            }
        }
        lines.extend(pod_labels.iter().map(|key| ("pod-label", key.clone())));
        lines.extend(labels.iter().map(|(name, value)| ("label", format!("{name}={value}"))));
        lines.extend(budgets.cpu.map(|share| ("cpu-budget", share.to_string())));
        lines.extend(budgets.memory_bytes.map(|bytes| ("memory-budget", bytes.to_string())));
        lines.extend(deny.comm.iter().map(|pattern| ("deny-comm", pattern.to_string())));
        lines.extend(deny.cgroup.iter().map(|pattern| ("deny-cgroup", pattern.to_string())));
        lines.extend(deny.uid.iter().map(|uid| ("deny-uid", uid.to_string())));
        lines.extend(rules.iter().map(|file| ("rules", file.display().to_string())));
        lines.iter().fold(String::new(), |text, (name, value)| text + &format!("--{name}={value}\n"))
    }
}

/// Patterns of at most `most` bytes that begin with `begin`.
fn patterns(
    option: &'static str,
    texts: &[String],
    most: usize,
    begin: &str,
) -> Result<Vec<Pattern>, ConfigError> {
    let wrong = |text: &str, cure| ConfigError::Value { option, value: text.to_owned(), cure };
    texts
        .iter()
        .map(|text| {
            let pattern = Pattern::parse(text)
                .map_err(|_| wrong(text, "give a name, with * only at its end, for any continuation"))?;
            if pattern.text().len() > most {
                return Err(wrong(
                    text,
                    "it is longer than the kernel compares: give a prefix with * at its end",
                ));
            }
            if !pattern.text().starts_with(begin) {
                return Err(wrong(text, "give a path below the hierarchy's root, beginning with /"));
            }
            Ok(pattern)
        })
        .collect()
}

fn read(path: &Path) -> Result<RunArgs, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    if text.trim().is_empty() {
        return Ok(RunArgs::default());
    }
    serde_saphyr::from_str(&text)
        .map_err(|error| ConfigError::Parse { path: path.to_owned(), reason: error.to_string() })
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty())
}

fn address(text: &str) -> SocketAddr {
    // PROOF: called with the constants of `ports` only, which the tests parse.
    text.parse().unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)))
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match text[digits.len()..].trim() {
            "" | "B" => 1,
            "KiB" | "Ki" => 1 << 10,
            "MiB" | "Mi" => 1 << 20,
            "GiB" | "Gi" => 1 << 30,
            other => return Err(format!("`{other}` is no unit of bytes: give KiB, MiB or GiB")),
        };
        let number: u64 =
            digits.parse().map_err(|_| format!("`{text}` is no number of bytes, like 64MiB"))?;
        number.checked_mul(unit).map(Self).ok_or_else(|| format!("`{text}` is too much"))
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = match text.trim().strip_suffix('%') {
            Some(number) => (number.trim_end(), 0.01),
            None => (text.trim(), 1.0),
        };
        let wrong = || format!("`{text}` is no share of a core: give 0.001 to 64, like 0.05 or 5%");
        let share = number.parse::<f64>().map_err(|_| wrong())? * unit;
        if (0.001..=64.0).contains(&share) { Ok(Self(share)) } else { Err(wrong()) }
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(f64),
            Text(String),
        }
        let text = match Form::deserialize(deserializer)? {
            Form::Number(number) => number.to_string(),
            Form::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl FromStr for Span {
    type Err = humantime::DurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        humantime::parse_duration(text).map(Self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(Self(number)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        run: RunArgs,
    }

    fn with(file: &str, flags: &[&str]) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.yaml");
        std::fs::write(&path, file).unwrap();
        let path = path.to_str().unwrap().to_owned();
        let mut words = vec!["run", "--config", &path];
        words.extend(flags);
        Cli::try_parse_from(words).unwrap().run.complete()
    }

    #[test]
    fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
        let config = with("node: of-file\nspool_bytes: 1MiB\nwindow: 5s\n", &["--node", "of-flag"]).unwrap();
        assert_eq!(config.node, "of-flag");
        assert_eq!((config.spool_bytes, config.window), (1 << 20, Duration::from_secs(5)));
        assert_eq!(config.table_bytes, 16 << 20);
        assert_eq!(config.listen.to_string(), ports::AGENT_PROBES);
        assert_eq!(config.debug_listen.to_string(), ports::AGENT_DEBUG);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_cure() {
        for (file, flags, words) in [
            ("nodes: x\n", &[][..], "nodes"),
            ("window: fast\n", &[], "window"),
            ("", &["--debug-listen", "0.0.0.0:6060"], "loopback"),
            ("", &["--hz-max", "5000"], "1 to 1000"),
            ("", &["--window", "1ms"], "1s to 10m"),
            ("", &["--ring-bytes", "1KiB"], "128KiB"),
            ("", &["--label", "x"], "NAME=VALUE"),
            ("", &["--kubelet-address", "http://10.0.0.1"], "HOST:PORT"),
            ("", &["--pod-label", "a b"], "key of a label"),
            ("", &["--pod-label", "a,b,c,d,e,f,g,h,i,j,k"], "at most 10"),
            ("", &["--deny-comm", "sixteen-bytes-ab"], "prefix"),
            ("deny_cgroup: [a/b]\n", &[], "beginning with /"),
        ] {
            let error = with(file, flags).unwrap_err().to_string();
            assert!(error.contains(words), "{file}{flags:?}: {error}");
        }
    }

    #[test]
    fn r26_processes_are_followed_unless_that_is_switched_off() {
        assert!(with("", &[]).unwrap().lifecycle);
        let off = with("lifecycle: false\n", &[]).unwrap();
        assert!(!off.lifecycle);
        assert!(off.lines().contains("--lifecycle=false\n"));
        assert!(with("lifecycle: false\n", &["--lifecycle", "true"]).unwrap().lifecycle);
        assert!(!with("", &["--lifecycle", "false"]).unwrap().lifecycle);
    }

    #[test]
    fn where_pods_come_from() {
        let pods = |flags: &[&str]| with("", flags).unwrap().pods;
        assert_eq!(pods(&["--kubelet", "none"]), None);
        assert_eq!(pods(&["--kubelet", "kubelet"]).unwrap().only, Some(SourceKind::Kubelet));
        let auto = pods(&["--node", "worker-1", "--kubelet-address", "fd00::1"]).unwrap();
        assert_eq!((auto.only, auto.node.as_str()), (None, "worker-1"));
        assert_eq!(auto.token_file, Path::new(SERVICE_ACCOUNT).join("token"));
        let config = with("pod_label: [team]\ncluster: east\n", &[]).unwrap();
        assert_eq!((config.pod_labels.cluster.as_str(), config.pod_labels.pod_labels.len()), ("east", 1));
        assert!(config.lines().contains("--kubelet=auto\n"));
        assert!(config.lines().contains("--pod-label=team\n"));
    }

    #[test]
    fn shares_of_a_core() {
        assert_eq!("5%".parse::<Share>().unwrap(), Share(0.05));
        assert_eq!("0.05".parse::<Share>().unwrap(), Share(0.05));
        for wrong in ["", "%", "0", "-1", "100", "five", "NaN"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
        let config = with("cpu_budget: 10%\nmemory_budget: 64MiB\n", &["--cpu-budget", "0.2"]).unwrap();
        assert_eq!(config.budgets, Budgets { cpu: Some(0.2), memory_bytes: Some(64 << 20) });
    }

    #[test]
    fn bytes_have_units() {
        assert_eq!("64KiB".parse::<Bytes>().unwrap(), Bytes(65_536));
        assert_eq!("7".parse::<Bytes>().unwrap(), Bytes(7));
        for wrong in ["", "KiB", "1 parsec", "99999999999GiB"] {
            assert!(wrong.parse::<Bytes>().is_err(), "{wrong}");
        }
    }
}
