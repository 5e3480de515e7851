//! Options of `gannet-agent run`: flags, environment variables (`GANNET_AGENT_…`), a YAML file, defaults, in this order of
//! precedence.
//!
//! [`RunOptions`] is the configuration: each option stands there once, with its default and its help.
//! [`Config`] adds the values that the agent derives from the options after it has checked them.

mod renamed;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use clap::{ArgAction, ArgMatches, Args, ValueEnum};
use gannet_base::{ByteSize, TimeSpan, logging::LogFormat};
use gannet_proto::{
    connect::{Dial, FileAccess},
    ports,
    rules::{Caps, Pattern},
    selector::LabelSelector,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use renamed::RENAMED;

use crate::{
    access::{OwnFiles, on_own_files, read_own_file},
    governor::Budgets,
    kernel::{MAX_CGROUP_PATH, MAX_COMM, default_ring_bytes},
    pods::{KUBELET_TIMEOUT, PodFeedKind, PodFeedOptions, PodLabelOptions, check_kubelet_address},
    process::{StartLabelError, StartLabelOptions},
    rules::{CAPTURE_SLOTS, Deny},
};

/// Default of `--state-dir`.
const STATE_DIR: &str = "/var/lib/gannet";
/// Directory of supplied unwind tables below it.
const OVERRIDES: &str = "overrides";
/// Certificate of the cluster's authority that Kubernetes mounts into each pod.
const SERVICE_ACCOUNT_CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
/// Token that Kubernetes mounts into each pod.
const SERVICE_ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Sockets at which the kubelet streams pods: the one of Kubernetes 1.36, then the one of its first design.
const PODINFO_SOCKETS: [&str; 2] =
    ["/var/lib/kubelet/pods-api/pods-api.sock", "/var/lib/kubelet/pods/kubelet.sock"];
/// A series has at most thirty labels; the agent's own and a rule's need room too.
const MAX_POD_LABELS: usize = 10;
/// Longest name of a node or a cluster: that of a DNS name.
const MAX_NAME: usize = 253;
/// Size of a kernel map that an option may ask for.
const MAP_BYTES: RangeInclusive<u64> = 128 << 10..=1 << 30;

/// Lists whose elements in the file stay when a flag adds more: something that the file denies stays denied.
const ADDITIVE: &[&str] = &["deny_comm", "deny_cgroup", "deny_uid"];

/// Options of `run`. Each is also a key of the file, with `_` for `-`.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunOptions {
    /// Read options from this YAML file; its keys are the option names with `_` for `-` (`state_dir: /var/lib/gannet`)
    #[arg(long, env = "GANNET_AGENT_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub(crate) config: Option<PathBuf>,
    /// Print the options in force as YAML, in the form that --config reads, and exit
    #[arg(long)]
    #[serde(skip)]
    pub(crate) print_config: bool,
    /// URL of the collector that receives profiles and sends rules, like https://HOST:4100; without it profiles stay in
    /// the spool on this node
    #[arg(long, env = "GANNET_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: Option<String>,
    /// Name of this node [default: the host name]
    #[arg(long, env = "GANNET_AGENT_NODE", value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// Label of this node, for rules that select nodes (repeatable)
    #[arg(long, env = "GANNET_AGENT_LABEL", value_name = "NAME=VALUE", value_delimiter = ',')]
    pub(crate) label: Vec<String>,
    /// Rule files of this node; the agent applies them again when they change (repeatable)
    #[arg(long, env = "GANNET_AGENT_RULES", value_name = "FILE", value_delimiter = ',', num_args = 1..)]
    pub(crate) rules: Vec<PathBuf>,
    /// Directory for the spool and the last good rules
    #[arg(long, env = "GANNET_AGENT_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
    pub(crate) state_dir: PathBuf,
    /// Directory of supplied unwind tables (*.unwind), for files whose own information is broken; the agent follows its
    /// changes [default: STATE_DIR/overrides]
    #[arg(long, env = "GANNET_AGENT_OVERRIDE_DIR", value_name = "DIR")]
    pub(crate) override_dir: Option<PathBuf>,
    /// Address of the node's debug page; must be on loopback
    #[arg(long, env = "GANNET_AGENT_DEBUG_LISTEN", value_name = "ADDRESS", default_value = ports::AGENT_DEBUG)]
    pub(crate) debug_listen: SocketAddr,
    /// Address of probes and metrics
    #[arg(long, env = "GANNET_AGENT_HTTP_LISTEN", value_name = "ADDRESS", default_value = ports::AGENT_PROBES)]
    pub(crate) http_listen: SocketAddr,
    /// Source of pod metadata
    #[arg(long, env = "GANNET_AGENT_POD_SOURCE", value_name = "SOURCE", default_value = "auto")]
    pub(crate) pod_source: PodSourceOption,
    /// Address of the kubelet, as status.hostIP has it: HOST, HOST:PORT or https://HOST:PORT
    #[arg(
        long,
        env = "GANNET_AGENT_KUBELET_ADDRESS",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:10250"
    )]
    pub(crate) kubelet_address: String,
    /// Authority that must have signed the kubelet's certificate (PEM)
    #[arg(long, env = "GANNET_AGENT_KUBELET_CA", value_name = "FILE", default_value = SERVICE_ACCOUNT_CA)]
    pub(crate) kubelet_ca: PathBuf,
    /// The kubelet's own certificate, if it is self-signed (PEM)
    #[arg(long, env = "GANNET_AGENT_KUBELET_CERTIFICATE", value_name = "FILE")]
    pub(crate) kubelet_certificate: Option<PathBuf>,
    /// Accept any certificate from the kubelet
    #[arg(long, env = "GANNET_AGENT_KUBELET_INSECURE")]
    pub(crate) kubelet_insecure: bool,
    /// File with the bearer token for the kubelet; the agent reads it again for each request
    #[arg(long, env = "GANNET_AGENT_KUBELET_TOKEN_FILE", value_name = "FILE", default_value = SERVICE_ACCOUNT_TOKEN)]
    pub(crate) kubelet_token_file: PathBuf,
    /// Socket at which the kubelet streams pods (Kubernetes 1.36 and later) [default: the usual ones]
    #[arg(long, env = "GANNET_AGENT_PODINFO_SOCKET", value_name = "FILE")]
    pub(crate) podinfo_socket: Option<PathBuf>,
    /// Pod label that the agent copies to the profiles of the pod (repeatable, at most 10)
    #[arg(long, env = "GANNET_AGENT_POD_LABEL", value_name = "KEY", value_delimiter = ',')]
    pub(crate) pod_label: Vec<String>,
    /// Label samples with the command line of the process, without secrets, up to 512 bytes
    #[arg(long, env = "GANNET_AGENT_LABEL_CMDLINE")]
    pub(crate) label_cmdline: bool,
    /// Label samples with the working directory that the process has at its first sample
    #[arg(long, env = "GANNET_AGENT_LABEL_CWD")]
    pub(crate) label_cwd: bool,
    /// Label samples with this environment variable of the process (repeatable, at most 16)
    #[arg(long, env = "GANNET_AGENT_LABEL_ENV", value_name = "NAME", value_delimiter = ',')]
    pub(crate) label_env: Vec<String>,
    /// Regular expression for secrets in these labels: its groups, or all that it matches, become [redacted] [default:
    /// passwords, tokens and keys, by name and by form]
    #[arg(long, env = "GANNET_AGENT_LABEL_REDACT", value_name = "REGEX")]
    pub(crate) label_redact: Option<String>,
    /// Name of the cluster, a label of all profiles
    #[arg(long, env = "GANNET_AGENT_CLUSTER", value_name = "NAME")]
    pub(crate) cluster: Option<String>,
    /// Highest sampling rate that a rule may ask for, in samples per second and CPU, 1 to 1000
    #[arg(long, env = "GANNET_AGENT_MAX_HZ", value_name = "HZ", default_value_t = 1000)]
    pub(crate) max_hz: u32,
    /// Never sample these commands, whatever rules ask for: exact, or a prefix with * at its end (repeatable)
    #[arg(long, env = "GANNET_AGENT_DENY_COMM", value_name = "PATTERN", value_delimiter = ',')]
    pub(crate) deny_comm: Vec<String>,
    /// Never sample processes in these control groups: a path, exact, or a prefix with * at its end (repeatable)
    #[arg(long, env = "GANNET_AGENT_DENY_CGROUP", value_name = "PATH", value_delimiter = ',')]
    pub(crate) deny_cgroup: Vec<String>,
    /// Never sample processes of these users (repeatable)
    #[arg(long, env = "GANNET_AGENT_DENY_UID", value_name = "UID", value_delimiter = ',')]
    pub(crate) deny_uid: Vec<u32>,
    /// CPU budget of the agent, including its BPF programs, as a share of one core: 0.05 or 5%. Over budget, the agent
    /// lowers sampling rates, then refuses captures [default: none]
    #[arg(long, env = "GANNET_AGENT_CPU_BUDGET", value_name = "SHARE")]
    pub(crate) cpu_budget: Option<CoreShare>,
    /// Memory budget of the agent. Over budget, it lowers sampling rates, then refuses captures [default: none]
    #[arg(long, env = "GANNET_AGENT_MEMORY_BUDGET", value_name = "BYTES")]
    pub(crate) memory_budget: Option<ByteSize>,
    /// Length of a window, the time that one profile covers: 1s to 10m
    #[arg(long, env = "GANNET_AGENT_WINDOW", value_name = "TIME", default_value = "10s")]
    pub(crate) window: TimeSpan,
    /// Size of the ring buffer between kernel and agent; rounded up to a power of two [default: 1MiB for each CPU, 2MiB
    /// to 16MiB]
    #[arg(long, env = "GANNET_AGENT_RING_BYTES", value_name = "BYTES")]
    pub(crate) ring_bytes: Option<ByteSize>,
    /// Size of the unwind tables in the kernel
    #[arg(long, env = "GANNET_AGENT_TABLE_BYTES", value_name = "BYTES", default_value = "16MiB")]
    pub(crate) table_bytes: ByteSize,
    /// Processes that the agent can track at one time
    #[arg(long, env = "GANNET_AGENT_PROCESSES", value_name = "N", default_value_t = 16_384)]
    pub(crate) processes: u32,
    /// Follow process start, exec and exit through kernel events. If false, the agent scans /proc every two seconds and
    /// misses short processes
    #[arg(long, env = "GANNET_AGENT_LIFECYCLE", value_name = "BOOL", default_value_t = true, action = ArgAction::Set)]
    pub(crate) lifecycle: bool,
    /// Run on a kernel that `check` refuses because it may lock up (5.19 to 6.3), for kernels that have the fix all the same
    #[arg(long, env = "GANNET_AGENT_ALLOW_UNSAFE_KERNEL")]
    pub(crate) allow_unsafe_kernel: bool,
    /// Disk space that the spool may use
    #[arg(long, env = "GANNET_AGENT_SPOOL_BYTES", value_name = "BYTES", default_value = "256MiB")]
    pub(crate) spool_bytes: ByteSize,
    /// Time for which the spool holds profiles that the collector has not taken
    #[arg(long, env = "GANNET_AGENT_SPOOL_AGE", value_name = "TIME", default_value = "24h")]
    pub(crate) spool_age: TimeSpan,
    /// Send the collector the debug information of sampled programs, each file that it lacks once. It then names the functions
    /// of stripped copies, also of those that other profilers sampled
    #[arg(long, env = "GANNET_AGENT_DEBUGINFO_UPLOAD")]
    pub(crate) debuginfo_upload: bool,
    /// Bytes a second for that, at least 64KiB
    #[arg(long, env = "GANNET_AGENT_DEBUGINFO_UPLOAD_RATE", value_name = "BYTES", default_value = "2MiB")]
    pub(crate) debuginfo_upload_rate: ByteSize,
    /// Larger files are not sent
    #[arg(
        long,
        env = "GANNET_AGENT_DEBUGINFO_UPLOAD_FILE_BYTES",
        value_name = "BYTES",
        default_value = "256MiB"
    )]
    pub(crate) debuginfo_upload_file_bytes: ByteSize,
    /// Allow plaintext to a collector that is not on loopback
    #[arg(long, env = "GANNET_AGENT_INSECURE")]
    pub(crate) insecure: bool,
    /// Authority that must have signed the collector's certificate (PEM) [default: the system's authorities]
    #[arg(long, env = "GANNET_AGENT_TLS_CA", value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Client certificate of the agent (PEM)
    #[arg(long, env = "GANNET_AGENT_TLS_CERT", value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert (PEM)
    #[arg(long, env = "GANNET_AGENT_TLS_KEY", value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
    /// File with a bearer token for the collector; the agent reads it again at each call
    #[arg(long, env = "GANNET_AGENT_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Form of log lines
    #[arg(long, env = "GANNET_AGENT_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
}

/// Values of `--pod-source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PodSourceOption {
    /// The first source that exists
    Auto,
    /// The kubelet's PodInfo socket
    Podinfo,
    /// The kubelet's HTTPS endpoint
    Kubelet,
    /// The API server
    Apiserver,
    /// No pod metadata
    None,
}

/// A share of one core, as `0.05` or `5%`, at least 0.001; more than one core is possible, up to 64.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct CoreShare(f64);

impl CoreShare {
    /// Returns the share: 1.0 is one core.
    pub(crate) fn get(self) -> f64 {
        self.0
    }
}

/// The options in force, checked, and the values that follow from them.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The options, with the host's own values for `node` and `ring_bytes` filled in.
    pub(crate) options: RunOptions,
    /// Name of this node.
    pub(crate) node: String,
    /// Directory of supplied unwind tables.
    pub(crate) override_dir: PathBuf,
    /// Address and credentials of the collector.
    pub(crate) dial: Option<Dial>,
    /// Labels of this node.
    pub(crate) labels: BTreeMap<String, String>,
    /// Access to the pod sources; none if no pod metadata is wanted.
    pub(crate) pods: Option<PodFeedOptions>,
    /// Labels that the agent derives from pods.
    pub(crate) pod_labels: PodLabelOptions,
    /// Labels that show how a process was started.
    pub(crate) start_labels: Option<StartLabelOptions>,
    /// Limits for rules on this node.
    pub(crate) caps: Caps,
    /// Processes that the agent never samples.
    pub(crate) deny: Deny,
    /// Limits for the agent itself.
    pub(crate) budgets: Budgets,
    /// Size of the ring buffer, in bytes.
    pub(crate) ring_bytes: u32,
    /// Size of the unwind tables in the kernel, in bytes.
    pub(crate) table_bytes: u32,
}

/// Reasons why the agent cannot work with its options.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] gannet_base::ConfigError),
    /// Labels cannot be made as the options ask.
    #[error(transparent)]
    StartLabels(#[from] StartLabelError),
    /// An option has a value that is not possible.
    #[error("--{option} {value}: {cure}")]
    Value {
        /// Name of the flag, without dashes.
        option: &'static str,
        /// The value given.
        value: String,
        /// Instruction for the user.
        cure: &'static str,
    },
}

fn wrong<T>(option: &'static str, value: &dyn fmt::Display, cure: &'static str) -> Result<T, ConfigError> {
    Err(ConfigError::Value { option, value: value.to_string(), cure })
}

impl Default for RunOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

impl RunOptions {
    /// Adds the file that `--config` names to the command line of `run`.
    pub fn load(&self, matches: &ArgMatches) -> Result<Self, ConfigError> {
        let effective: Self = gannet_base::effective(matches, self.config.as_deref(), ADDITIVE, &RENAMED)?;
        Ok(Self { config: None, print_config: self.print_config, ..effective })
    }

    /// Returns the form of log lines.
    pub fn log_format(&self) -> LogFormat {
        self.log_format
    }

    /// Returns the options in force as YAML if `--print-config` was given.
    pub fn printed(&self) -> Result<Option<String>, ConfigError> {
        if !self.print_config {
            return Ok(None);
        }
        Ok(Some(self.clone().complete()?.options.to_yaml()?))
    }

    /// Returns the YAML that `--config` reads back as these options. It holds paths of secrets, never secrets.
    pub(crate) fn to_yaml(&self) -> Result<String, ConfigError> {
        Ok(gannet_base::to_yaml(self)?)
    }

    /// Checks the options and derives what the parts of the agent need.
    pub(crate) fn complete(mut self) -> Result<Config, ConfigError> {
        if !self.debug_listen.ip().is_loopback() {
            let cure = "the debug page shows too much for a network: give a loopback address and use kubectl port-forward";
            return wrong("debug-listen", &self.debug_listen, cure);
        }
        if !(Duration::from_secs(1)..=Duration::from_secs(600)).contains(&self.window.0) {
            return wrong("window", &self.window, "give 1s to 10m");
        }
        if !(1..=1000).contains(&self.max_hz) {
            return wrong("max-hz", &self.max_hz, "give 1 to 1000");
        }
        if !(64..=1 << 20).contains(&self.processes) {
            return wrong("processes", &self.processes, "give 64 to 1048576");
        }
        if self.debuginfo_upload && self.endpoint.is_none() {
            return wrong("debuginfo-upload", &true, "give --endpoint too, the collector that takes it");
        }
        if self.debuginfo_upload_rate.0 < 64 << 10 {
            return wrong("debuginfo-upload-rate", &self.debuginfo_upload_rate, "give at least 64KiB");
        }
        let node = self.node.take().unwrap_or_else(host_name);
        if node.is_empty() || node.len() > MAX_NAME {
            return wrong("node", &node, "give a name of 1 to 253 bytes");
        }
        self.node = Some(node.clone());
        let ring_bytes = self.ring_bytes.unwrap_or(ByteSize(default_ring_bytes().into()));
        self.ring_bytes = Some(ring_bytes);
        Ok(Config {
            override_dir: self.override_dir.clone().unwrap_or_else(|| self.state_dir.join(OVERRIDES)),
            dial: self.dial(),
            labels: self.labels()?,
            pods: self.pods(&node)?,
            pod_labels: self.pod_labels()?,
            start_labels: StartLabelOptions::new(
                self.label_cmdline,
                self.label_cwd,
                &self.label_env,
                self.label_redact.as_deref(),
            )?,
            caps: Caps { max_hz: self.max_hz, max_concurrent: CAPTURE_SLOTS as u32, ..Caps::default() },
            deny: Deny {
                comm: patterns("deny-comm", &self.deny_comm, MAX_COMM, "")?,
                cgroup: patterns("deny-cgroup", &self.deny_cgroup, MAX_CGROUP_PATH, "/")?,
                uid: self.deny_uid.clone(),
                containers: BTreeSet::new(),
            },
            budgets: Budgets {
                cpu: self.cpu_budget.map(|share| share.0),
                memory_bytes: self.memory_budget.map(|size| size.0),
            },
            ring_bytes: map_size("ring-bytes", ring_bytes)?,
            table_bytes: map_size("table-bytes", self.table_bytes)?,
            node,
            options: self,
        })
    }

    fn dial(&self) -> Option<Dial> {
        self.endpoint.clone().map(|url| Dial {
            url,
            insecure: self.insecure,
            ca: self.tls_ca.clone(),
            cert: self.tls_cert.clone(),
            key: self.tls_key.clone(),
            token_file: self.token_file.clone(),
            files: FileAccess {
                read: |path| read_own_file(OwnFiles::Connection, path),
                stamp: |path| {
                    let theirs = path.to_owned();
                    on_own_files(OwnFiles::Connection, path, move || FileAccess::stamp_now(&theirs))?
                },
            },
        })
    }

    fn labels(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let pair = |label: &String| match label.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => wrong("label", label, "write NAME=VALUE"),
        };
        self.label.iter().map(pair).collect()
    }

    fn pod_labels(&self) -> Result<PodLabelOptions, ConfigError> {
        if self.pod_label.len() > MAX_POD_LABELS {
            let given = format!("({} of them)", self.pod_label.len());
            return wrong("pod-label", &given, "give at most 10: each makes more series");
        }
        let is_key = |key: &str| !key.contains(['=', '!', ' ', '(']) && LabelSelector::parse(key).is_ok();
        if let Some(key) = self.pod_label.iter().find(|key| !is_key(key)) {
            return wrong("pod-label", key, "give the key of a label, like app.kubernetes.io/version");
        }
        let cluster = self.cluster.clone().unwrap_or_default();
        if cluster.len() > MAX_NAME {
            return wrong("cluster", &cluster, "give a name of at most 253 bytes");
        }
        Ok(PodLabelOptions { cluster, pod_labels: self.pod_label.clone() })
    }

    fn pods(&self, node: &str) -> Result<Option<PodFeedOptions>, ConfigError> {
        if check_kubelet_address(&self.kubelet_address).is_err() {
            let cure = "write HOST, HOST:PORT or https://HOST:PORT, IPv6 in brackets";
            return wrong("kubelet-address", &self.kubelet_address, cure);
        }
        let only = match self.pod_source {
            PodSourceOption::None => return Ok(None),
            PodSourceOption::Auto => None,
            PodSourceOption::Podinfo => Some(PodFeedKind::PodInfo),
            PodSourceOption::Kubelet => Some(PodFeedKind::Kubelet),
            PodSourceOption::Apiserver => Some(PodFeedKind::ApiServer),
        };
        Ok(Some(PodFeedOptions {
            only,
            node: node.to_owned(),
            podinfo_sockets: match &self.podinfo_socket {
                Some(socket) => vec![socket.clone()],
                None => PODINFO_SOCKETS.iter().map(PathBuf::from).collect(),
            },
            kubelet_address: self.kubelet_address.clone(),
            kubelet_ca: self.kubelet_ca.clone(),
            kubelet_certificate: self.kubelet_certificate.clone(),
            kubelet_insecure: self.kubelet_insecure,
            token_file: self.kubelet_token_file.clone(),
            kubelet_timeout: KUBELET_TIMEOUT,
            apiserver: is_set("KUBERNETES_SERVICE_HOST") || is_set("KUBECONFIG"),
        }))
    }
}

/// Returns the directory of supplied unwind tables of an agent with default options.
pub(crate) fn default_override_dir() -> PathBuf {
    Path::new(STATE_DIR).join(OVERRIDES)
}

fn map_size(option: &'static str, size: ByteSize) -> Result<u32, ConfigError> {
    match u32::try_from(size.0) {
        Ok(bytes) if MAP_BYTES.contains(&size.0) => Ok(bytes),
        _ => wrong(option, &size, "give 128KiB to 1GiB"),
    }
}

/// Parses patterns of at most `max_bytes` that start with `start`.
fn patterns(
    option: &'static str,
    texts: &[String],
    max_bytes: usize,
    start: &str,
) -> Result<Vec<Pattern>, ConfigError> {
    let parse = |text: &String| {
        let Ok(pattern) = Pattern::parse(text) else {
            return wrong(option, text, "give a name, with * only at its end, for any continuation");
        };
        if pattern.text().len() > max_bytes {
            return wrong(
                option,
                text,
                "it is longer than the kernel compares: give a prefix with * at its end",
            );
        }
        if !pattern.text().starts_with(start) {
            return wrong(option, text, "give a path below the hierarchy's root, beginning with /");
        }
        Ok(pattern)
    };
    texts.iter().map(parse).collect()
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty())
}

impl FromStr for CoreShare {
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

impl Serialize for CoreShare {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

impl<'de> Deserialize<'de> for CoreShare {
    /// Accepts a number as well as a text.
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

#[cfg(test)]
mod tests;
