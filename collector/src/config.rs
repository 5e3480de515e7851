//! What the collector is told at start, and what of it cannot work.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    StartError,
    auth::{Grant, NodeIdentity},
    forward::{Forward, ForwardOptions},
    store::Bucket,
};

/// The largest compressed profile that is taken, unless told otherwise: what Pyroscope takes by default, so that what
/// is stored here can be handed on.
pub const DEFAULT_MAX_BATCH_BYTES: u64 = 4 << 20;
/// How many unanswered batches an agent may have on one stream.
pub const MAX_IN_FLIGHT: u32 = 32;

/// Everything that can be set.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directory that holds everything the collector keeps, or all but the profiles.
    pub data: PathBuf,
    /// Where the profiles are kept, if not in `data`. Several collectors may share it.
    pub bucket: Option<Bucket>,
    /// How often a bucket is looked at for what others did there.
    pub bucket_interval: Duration,
    /// Where the rules are kept.
    pub rules_store: RulesStore,
    /// Where gRPC is served.
    pub listen: SocketAddr,
    /// Where the page, the HTTP API, metrics and probes are served.
    pub http: SocketAddr,
    /// Where the same is served once more, in plaintext and without a certificate asked for: on loopback only.
    pub http_local: Option<SocketAddr>,
    /// Serve an address that is not loopback without TLS.
    pub insecure: bool,
    /// Certificates for both listeners.
    pub tls: Option<TlsFiles>,
    /// Where profiles are handed on to.
    pub forward: Vec<Forward>,
    /// How those are spoken to.
    pub forward_options: ForwardOptions,
    /// How often the files of certificates are looked at.
    pub tls_reload_interval: Duration,
    /// Who may do what, of those who prove who they are; none: all of them everything.
    pub roles: Vec<Grant>,
    /// What an agent's claim to be a node is held against.
    pub node_identity: NodeIdentity,
    /// Take tokens that the Kubernetes API vouches for and that are for this audience.
    pub token_audience: Option<String>,
    /// How to reach the Kubernetes API; none: as a pod does, or as `kubectl` does.
    pub kubeconfig: Option<PathBuf>,
    /// Profiles whose window started longer ago are removed, and refused.
    pub retention_age: Duration,
    /// The oldest profiles are removed while all together are larger.
    pub retention_bytes: u64,
    /// How often retention looks, besides when a new profile exceeds `retention_bytes`.
    pub retention_interval: Duration,
    /// Nothing is taken while the disk has less room than this left, so that the index never meets a full disk.
    pub min_free_bytes: u64,
    /// The largest compressed profile that is taken.
    pub max_batch_bytes: u64,
    /// How far in the future a window may start: clocks differ.
    pub max_clock_ahead: Duration,
    /// Profiles that wait to be written, all streams together, in bytes.
    pub ingest_queue_bytes: u64,
    /// Series that are held at one time.
    pub max_series: usize,
    /// Nodes that are known at one time.
    pub max_nodes: usize,
    /// Profiles that one query may merge.
    pub query_max_profiles: usize,
    /// Bytes of stored profiles that one query may read.
    pub query_max_bytes: u64,
    /// Memory for results of merges, so that a graph, a table and a download of one selection merge once.
    pub query_cache_bytes: u64,
    /// How long a graceful end may take before open streams are cut.
    pub shutdown_timeout: Duration,
}

/// Where the rules are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulesStore {
    /// In a file: below `data`, or in a directory that several collectors may share.
    File(Option<PathBuf>),
    /// In a ConfigMap and TriggerRule resources of this namespace, by default that of the collector.
    Kubernetes(Option<String>),
}

impl RulesStore {
    /// Reads `file`, `file=DIR`, `kubernetes`, `kubernetes=NAMESPACE`.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "file" => Ok(Self::File(None)),
            Some(("file", dir)) if !dir.is_empty() => Ok(Self::File(Some(dir.into()))),
            None if text == "kubernetes" => Ok(Self::Kubernetes(None)),
            Some(("kubernetes", namespace)) if !namespace.is_empty() => {
                Ok(Self::Kubernetes(Some(namespace.to_owned())))
            }
            _ => Err(format!(
                "`{text}` is no rule store: write `file`, `file=DIR` for a directory that collectors share, `kubernetes`, or \
                 `kubernetes=NAMESPACE`"
            )),
        }
    }
}

/// PEM files.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate chain of this collector, its own certificate first.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities whose clients are let in; none: any client.
    pub client_ca: Option<PathBuf>,
}

impl Config {
    /// The defaults of the command line, on any free port of the loopback address.
    pub fn new(data: impl Into<PathBuf>) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            data: data.into(),
            bucket: None,
            bucket_interval: Duration::from_secs(30),
            rules_store: RulesStore::File(None),
            listen: any,
            http: any,
            http_local: None,
            insecure: false,
            tls: None,
            forward: Vec::new(),
            forward_options: ForwardOptions::default(),
            tls_reload_interval: Duration::from_secs(5),
            roles: Vec::new(),
            node_identity: NodeIdentity::Any,
            token_audience: None,
            kubeconfig: None,
            retention_age: Duration::from_secs(7 * 24 * 3600),
            retention_bytes: 10 << 30,
            retention_interval: Duration::from_secs(60),
            min_free_bytes: 64 << 20,
            max_batch_bytes: DEFAULT_MAX_BATCH_BYTES,
            max_clock_ahead: Duration::from_secs(600),
            ingest_queue_bytes: 128 << 20,
            max_series: 200_000,
            max_nodes: 10_000,
            query_max_profiles: 100_000,
            query_max_bytes: 2 << 30,
            query_cache_bytes: 128 << 20,
            shutdown_timeout: Duration::from_secs(10),
        }
    }

    /// Refuses what cannot work or would be unsafe, naming the flag that cures it.
    pub fn check(&self) -> Result<(), StartError> {
        let wrong = |text: String| Err(StartError::Config(text));
        if self.tls.is_none() && !self.insecure {
            for (flag, addr) in [("--listen", self.listen), ("--http", self.http)] {
                if !addr.ip().is_loopback() {
                    return wrong(format!(
                        "{flag} {addr} can be reached from other machines and would be plaintext: give --tls-cert and \
                         --tls-key, or a loopback address, or --insecure if the network is trusted"
                    ));
                }
            }
        }
        let with_client_ca = self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        if !self.roles.is_empty() && !with_client_ca && self.token_audience.is_none() {
            return wrong(
                "--role: nobody can prove who they are: give --tls-client-ca or --token-audience as well"
                    .into(),
            );
        }
        match self.node_identity {
            NodeIdentity::Certificate if !with_client_ca => {
                return wrong("--node-identity certificate: give --tls-client-ca as well".into());
            }
            NodeIdentity::Token if self.token_audience.is_none() => {
                return wrong("--node-identity token: give --token-audience as well".into());
            }
            _ => {}
        }
        if self.token_audience.is_some()
            && self.tls.is_none()
            && !self.insecure
            && !self.listen.ip().is_loopback()
        {
            return wrong(
                "--token-audience: tokens would be sent in plaintext: give --tls-cert and --tls-key".into(),
            );
        }
        if self.listen == self.http && self.listen.port() != 0 {
            return wrong(format!("--listen and --http are both {}: give them different ports", self.listen));
        }
        if let Some(local) = self.http_local.filter(|local| !local.ip().is_loopback()) {
            return wrong(format!(
                "--http-local {local} can be reached from other machines, and whoever reaches it is let in: give a \
                 loopback address, like 127.0.0.1:4181"
            ));
        }
        if self.retention_age < Duration::from_secs(60) {
            return wrong(
                "--retention-age is below a minute: profiles would be gone before they are seen".into(),
            );
        }
        if self.max_batch_bytes == 0 || self.max_batch_bytes > 64 << 20 {
            return wrong("--max-batch-bytes must be between 1 byte and 64 MiB".into());
        }
        if self.ingest_queue_bytes < self.max_batch_bytes {
            return wrong("the ingest queue must hold at least one batch of the largest size".into());
        }
        if self.retention_bytes < self.max_batch_bytes {
            return wrong(format!(
                "--retention-bytes {} does not hold even one profile of --max-batch-bytes {}",
                self.retention_bytes, self.max_batch_bytes
            ));
        }
        Ok(())
    }
}

/// Reads `10GiB`, `512MiB`, `4k`, `1000`: powers of 1024 for `KiB` and `k`, powers of 1000 for `KB`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" | "ki" => 1 << 10,
        "m" | "mib" | "mi" => 1 << 20,
        "g" | "gib" | "gi" => 1 << 30,
        "t" | "tib" | "ti" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        other => {
            return Err(format!("`{other}` is not a unit of bytes: use KiB, MiB, GiB or TiB, as in `10GiB`"));
        }
    };
    let too_large = || format!("`{text}` is more bytes than can be counted");
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(too_large);
    }
    match number.parse::<f64>() {
        Ok(n) if n.is_finite() && n * factor as f64 <= u64::MAX as f64 => Ok((n * factor as f64) as u64),
        Ok(_) => Err(too_large()),
        Err(_) => Err(format!("`{text}` is not a number of bytes: write it like `10GiB`")),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("1000", Ok(1000))]
    #[case("10GiB", Ok(10 << 30))]
    #[case("1.5 KiB", Ok(1536))]
    #[case("3MB", Ok(3_000_000))]
    #[case("64k", Ok(65536))]
    #[case("5 apples", Err(()))]
    #[case("", Err(()))]
    #[case("99999999999TiB", Err(()))]
    fn sizes_are_read_with_their_unit(#[case] text: &str, #[case] want: Result<u64, ()>) {
        assert_eq!(parse_bytes(text).map_err(|_| ()), want);
    }

    #[rstest]
    #[case::grpc(|c: &mut Config| c.listen = ([0, 0, 0, 0], 4100).into(), "--listen 0.0.0.0:4100")]
    #[case::http(|c: &mut Config| c.http = ([10, 0, 0, 1], 80).into(), "--http 10.0.0.1:80")]
    #[case::local(|c: &mut Config| c.http_local = Some(([0, 0, 0, 0], 4181).into()), "--http-local 0.0.0.0:4181")]
    #[case::roles(|c: &mut Config| c.roles = vec!["editor=anna".parse().unwrap()], "--tls-client-ca")]
    #[case::identity(|c: &mut Config| c.node_identity = NodeIdentity::Token, "--token-audience")]
    #[case::same(|c: &mut Config| { c.listen.set_port(9); c.http.set_port(9) }, "different ports")]
    #[case::young(|c: &mut Config| c.retention_age = Duration::from_secs(1), "--retention-age")]
    fn what_cannot_work_is_refused_with_its_flag(#[case] change: fn(&mut Config), #[case] says: &str) {
        let mut config = Config::new("/data");
        assert!(config.check().is_ok());
        change(&mut config);
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn plaintext_beyond_loopback_must_be_asked_for() {
        let mut config = Config::new("/data");
        config.listen = ([0, 0, 0, 0], 4100).into();
        assert!(config.check().unwrap_err().to_string().contains("--insecure"));
        config.insecure = true;
        assert!(config.check().is_ok());
    }
}
