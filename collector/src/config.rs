//! The configuration of the collector: the options of all modules, and the checks that concern several of them.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use crate::{
    auth::{AuthOptions, NodeIdentity},
    fleet::FleetOptions,
    forward::ForwardOptions,
    ingest::IngestOptions,
    query::QueryOptions,
    rules::RulesLocation,
    server::listener::ServerOptions,
    store::StoreOptions,
    tls::TlsOptions,
};

/// Everything that an operator can set.
#[derive(Debug, Clone)]
pub struct Config {
    /// The directory of all stored data, or of all but the profiles if these lie in a bucket.
    pub data: PathBuf,
    /// The kubeconfig file. `None`: the service account of the pod, or the context of `kubectl`.
    pub kubeconfig: Option<PathBuf>,
    /// Listening addresses.
    pub server: ServerOptions,
    /// Certificates of both listeners. `None`: plaintext.
    pub tls: Option<TlsOptions>,
    /// Authentication and roles.
    pub auth: AuthOptions,
    /// Stored profiles.
    pub store: StoreOptions,
    /// Accepted batches.
    pub ingest: IngestOptions,
    /// Limits of queries.
    pub query: QueryOptions,
    /// Location of the rules.
    pub rules: RulesLocation,
    /// Known nodes.
    pub fleet: FleetOptions,
    /// Targets of forwarding.
    pub forward: ForwardOptions,
}

/// A configuration that cannot work or would be unsafe. The text names the flag and the cure.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl Config {
    /// Returns the defaults of the command line, but listening on any free loopback port.
    pub fn new(data: impl Into<PathBuf>) -> Self {
        Self {
            data: data.into(),
            kubeconfig: None,
            server: ServerOptions::default(),
            tls: None,
            auth: AuthOptions::default(),
            store: StoreOptions::default(),
            ingest: IngestOptions::default(),
            query: QueryOptions::default(),
            rules: RulesLocation::File(None),
            fleet: FleetOptions::default(),
            forward: ForwardOptions::default(),
        }
    }

    /// Reports whether the listeners verify client certificates.
    pub(crate) fn has_client_ca(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some())
    }

    /// Checks the options, each alone and with each other.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        self.check_addresses()?;
        self.check_auth()?;
        self.check_sizes()
    }

    fn check_addresses(&self) -> Result<(), ConfigError> {
        let ServerOptions { grpc_listen, http_listen, debug_listen, insecure, .. } = &self.server;
        if self.tls.is_none() && !insecure {
            for (flag, addr) in [("--listen", grpc_listen), ("--http", http_listen)] {
                if !addr.ip().is_loopback() {
                    return wrong(format!(
                        "{flag} {addr} is plaintext and other machines can reach it: give --tls-cert and --tls-key, or a \
                         loopback address, or --insecure if you trust the network"
                    ));
                }
            }
        }
        if grpc_listen == http_listen && grpc_listen.port() != 0 {
            return wrong(format!("--listen and --http are both {grpc_listen}: give them different ports"));
        }
        let is_open = |addr: &&SocketAddr| !addr.ip().is_loopback();
        if let Some(addr) = debug_listen.as_ref().filter(is_open) {
            return wrong(format!(
                "--http-local {addr} lets in every client, and other machines can reach it: give a loopback address, like \
                 127.0.0.1:4181"
            ));
        }
        Ok(())
    }

    fn check_auth(&self) -> Result<(), ConfigError> {
        let AuthOptions { roles, node_identity, token_audience } = &self.auth;
        let has_client_ca = self.has_client_ca();
        if !roles.is_empty() && !has_client_ca && token_audience.is_none() {
            return wrong(
                "--role: no caller can prove its identity: give --tls-client-ca or --token-audience as well",
            );
        }
        match node_identity {
            NodeIdentity::Certificate if !has_client_ca => {
                return wrong("--node-identity certificate: give --tls-client-ca as well");
            }
            NodeIdentity::Token if token_audience.is_none() => {
                return wrong("--node-identity token: give --token-audience as well");
            }
            _ => {}
        }
        let is_local = self.server.grpc_listen.ip().is_loopback();
        if token_audience.is_some() && self.tls.is_none() && !self.server.insecure && !is_local {
            return wrong(
                "--token-audience: clients would send tokens in plaintext: give --tls-cert and --tls-key",
            );
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<(), ConfigError> {
        let max_batch_bytes = self.ingest.max_batch_bytes;
        if self.store.retention_age < Duration::from_secs(60) {
            return wrong(
                "--retention-age is below a minute: retention would remove profiles before anyone sees them",
            );
        }
        if max_batch_bytes == 0 || max_batch_bytes > 64 << 20 {
            return wrong("--max-batch-bytes must be between 1 byte and 64 MiB");
        }
        if self.ingest.queue_bytes < max_batch_bytes {
            return wrong("the ingest queue must hold at least one batch of the largest size");
        }
        if self.store.retention_bytes < max_batch_bytes {
            return wrong(format!(
                "--retention-bytes {} is too small for one profile of --max-batch-bytes {max_batch_bytes}",
                self.store.retention_bytes
            ));
        }
        Ok(())
    }
}

fn wrong(text: impl Into<String>) -> Result<(), ConfigError> {
    Err(ConfigError(text.into()))
}

/// Parses a size: `10GiB`, `512MiB`, `4k`, `1000`. `KiB` and `k` are powers of 1024, `KB` is a power of 1000.
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
    #[case::grpc(|c: &mut Config| c.server.grpc_listen = ([0, 0, 0, 0], 4100).into(), "--listen 0.0.0.0:4100")]
    #[case::http(|c: &mut Config| c.server.http_listen = ([10, 0, 0, 1], 80).into(), "--http 10.0.0.1:80")]
    #[case::debug(|c: &mut Config| c.server.debug_listen = Some(([0, 0, 0, 0], 4181).into()), "--http-local 0.0.0.0:4181")]
    #[case::roles(|c: &mut Config| c.auth.roles = vec!["editor=anna".parse().unwrap()], "--tls-client-ca")]
    #[case::identity(|c: &mut Config| c.auth.node_identity = NodeIdentity::Token, "--token-audience")]
    #[case::same(|c: &mut Config| { c.server.grpc_listen.set_port(9); c.server.http_listen.set_port(9) }, "different ports")]
    #[case::young(|c: &mut Config| c.store.retention_age = Duration::from_secs(1), "--retention-age")]
    fn an_impossible_configuration_names_its_flag(#[case] change: fn(&mut Config), #[case] says: &str) {
        let mut config = Config::new("/data");
        assert!(config.check().is_ok());
        change(&mut config);
        let error = config.check().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn plaintext_beyond_loopback_needs_insecure() {
        let mut config = Config::new("/data");
        config.server.grpc_listen = ([0, 0, 0, 0], 4100).into();
        assert!(config.check().unwrap_err().to_string().contains("--insecure"));
        config.server.insecure = true;
        assert!(config.check().is_ok());
    }
}
