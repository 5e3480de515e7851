//! Files from servers of debuginfod, such as those of Linux distributions.
//!
//! A server gets the build ids of frames without a name, and nothing else. The collector checks a downloaded file like an uploaded one.

use std::{fmt, str::FromStr, time::Duration};

use gannet_elf::BuildId;
use gannet_proto::connect;
use reqwest::{Client, StatusCode};
use tokio::sync::Semaphore;

use super::{
    DebugInfoError,
    files::{DebugFiles, Incoming},
};
use crate::tls;

/// Maximum number of downloads at the same time.
const MAX_DOWNLOADS: usize = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for one file.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(300);
/// Time limit for the first part of a file, and for each further one. A server may have to unpack an archive before the first part.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// The URL of a server: `https://debuginfod.debian.net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DebuginfodUrl(url::Url);

impl FromStr for DebuginfodUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "write a URL like https://debuginfod.debian.net";
        let url = url::Url::parse(text).map_err(|error| format!("{error}: {form}"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
            return Err(format!("`{text}` is not a server of debuginfod: {form}"));
        }
        if url.query().is_some()
            || url.fragment().is_some()
            || !url.username().is_empty()
            || url.password().is_some()
        {
            return Err(format!("the URL holds more than a server and a path: {form}"));
        }
        Ok(Self(url))
    }
}

impl fmt::Display for DebuginfodUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str().trim_end_matches('/'))
    }
}

gannet_base::serde_as_text!(DebuginfodUrl);

/// The client of the servers. It requests a file from one after the other.
pub(super) struct Debuginfod {
    servers: Vec<DebuginfodUrl>,
    client: Client,
    permits: Semaphore,
    max_bytes: u64,
}

/// The answer of one server.
enum Fetched {
    File(Incoming),
    /// The server has no such file.
    Missing,
}

impl Debuginfod {
    /// Builds the client, which connects with the first request. Returns `None` without servers.
    pub(super) fn new(servers: &[DebuginfodUrl], max_bytes: u64) -> Result<Option<Self>, String> {
        if servers.is_empty() {
            return Ok(None);
        }
        let is_secure = servers.iter().any(|server| server.0.scheme() == "https");
        let roots = if is_secure {
            tls::client_roots(&connect::authority(None).map_err(|error| error.to_string())?)?
        } else {
            Vec::new()
        };
        let client = tls::http_client(roots)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .timeout(DOWNLOAD_TIMEOUT)
            .build()
            .map_err(|error| connect::innermost(&error))?;
        Ok(Some(Self {
            servers: servers.to_vec(),
            client,
            permits: Semaphore::new(MAX_DOWNLOADS),
            max_bytes,
        }))
    }

    /// Downloads the file of a build id from the first server that has it. Returns `None` if no server has it. Returns an error only if
    /// no server has it and one failed.
    pub(super) async fn fetch(
        &self,
        build_id: &BuildId,
        files: &DebugFiles,
    ) -> Result<Option<Incoming>, DebugInfoError> {
        let Ok(_permit) = self.permits.acquire().await else { return Ok(None) };
        let mut failed = None;
        for server in &self.servers {
            match self.fetch_from(server, build_id, files).await {
                Ok(Fetched::File(incoming)) => return Ok(Some(incoming)),
                Ok(Fetched::Missing) => {}
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(None), Err)
    }

    async fn fetch_from(
        &self,
        server: &DebuginfodUrl,
        build_id: &BuildId,
        files: &DebugFiles,
    ) -> Result<Fetched, DebugInfoError> {
        let failed = |reason: String| DebugInfoError::Server { server: server.to_string(), reason };
        let url = format!("{server}/buildid/{build_id}/debuginfo");
        let broken = |error: reqwest::Error| failed(connect::innermost(&error));
        let mut response = self.client.get(url).send().await.map_err(broken)?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(Fetched::Missing),
            status => return Err(failed(status.to_string())),
        }
        let too_large =
            || failed(format!("the file is larger than {} bytes (--debuginfo-file-bytes)", self.max_bytes));
        let claimed = response.content_length().unwrap_or(0);
        if claimed > self.max_bytes {
            return Err(too_large());
        }
        let mut incoming = files.begin(claimed).await?;
        let mut left = self.max_bytes;
        while let Some(chunk) = response.chunk().await.map_err(broken)? {
            left = left.checked_sub(chunk.len() as u64).ok_or_else(too_large)?;
            incoming.write(&chunk).await?;
        }
        Ok(Fetched::File(incoming))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("debuginfod.debian.net", "relative URL")]
    #[case("ftp://server/", "not a server of debuginfod")]
    #[case("http://user:secret@server/", "more than a server")]
    #[case("http://server/?x=y", "more than a server")]
    fn a_wrong_server_is_refused_with_the_form(#[case] text: &str, #[case] reason: &str) {
        let error = text.parse::<DebuginfodUrl>().unwrap_err();
        assert!(error.contains(reason) && error.contains("write a URL like"), "{error}");
    }

    #[test]
    fn a_server_may_have_a_path() {
        for (text, shown) in [("http://s:8002", "http://s:8002"), ("https://s/debug/", "https://s/debug")] {
            assert_eq!(text.parse::<DebuginfodUrl>().unwrap().to_string(), shown);
        }
    }
}
