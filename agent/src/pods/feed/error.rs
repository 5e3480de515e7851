//! Why pod feeds fail, and what to do about it.

use std::{io, path::PathBuf};

/// Why a pod feed does not work. `at` names the server, `said` is empty or its text behind `": "`.
#[derive(Debug, thiserror::Error)]
pub enum PodFeedError {
    /// Nothing indicates that the feed exists on this node. This is no fault.
    #[error("{0}")]
    Absent(String),
    /// The agent cannot read a file that the feed needs.
    #[error("cannot read {what} {}: {source}; {cure}", path.display())]
    File {
        /// The role of the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
        /// What to do.
        cure: &'static str,
    },
    /// The configured address is invalid.
    #[error("`{0}` is no address of a kubelet: write HOST, HOST:PORT or https://HOST:PORT, IPv6 in brackets")]
    Address(String),
    /// A certificate file is invalid.
    #[error("the certificates in {} cannot be used: {reason}", path.display())]
    Certificates {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The server does not answer.
    #[error("cannot reach {at}: {reason}")]
    Unreachable {
        /// The server.
        at: String,
        /// The error of the connection.
        reason: String,
    },
    /// The server's certificate is not trusted.
    #[error(
        "{at} shows a certificate that is not trusted: {reason}; give its authority with --kubelet-ca, or its own \
         certificate with --kubelet-certificate (kubeadm: /var/lib/kubelet/pki/kubelet.crt)"
    )]
    Untrusted {
        /// The server.
        at: String,
        /// What is wrong with the certificate.
        reason: String,
    },
    /// Status 401.
    #[error(
        "{at} does not know the token (401): is {} of this cluster, and does the kubelet run with webhook \
         authentication (authentication.webhook.enabled)?",
        token.display()
    )]
    Unauthenticated {
        /// The server.
        at: String,
        /// The token's file.
        token: PathBuf,
    },
    /// Status 403.
    #[error("{at} does not allow it (403){said}; the service account needs a ClusterRole with {rule}")]
    Forbidden {
        /// The server.
        at: String,
        /// Its text.
        said: String,
        /// The missing rule.
        rule: &'static str,
    },
    /// Another status than 200.
    #[error("{at} answered {status}{said}")]
    Status {
        /// The server.
        at: String,
        /// The status.
        status: u16,
        /// Its text.
        said: String,
    },
    /// The server took too long.
    #[error("{at} did not answer within {seconds} s")]
    Timeout {
        /// The server.
        at: String,
        /// The time limit.
        seconds: u64,
    },
    /// The answer is too large.
    #[error("{at} answered with more than {max_bytes} bytes, which is no list of one node's pods")]
    TooLarge {
        /// The server.
        at: String,
        /// The limit.
        max_bytes: u64,
    },
    /// The answer is no list of pods.
    #[error("{at} answered with something else than pods: {reason}")]
    Invalid {
        /// The server.
        at: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The server ended the stream.
    #[error("{at} ended the stream{said}")]
    Ended {
        /// The server.
        at: String,
        /// Its text.
        said: String,
    },
}

/// Returns a server's text for an error: behind `": "`, one line, at most 200 characters. Returns an empty string for none.
pub(super) fn quote(text: &str) -> String {
    let line: String =
        text.lines().next().unwrap_or("").chars().filter(|c| !c.is_control()).take(200).collect();
    if line.trim().is_empty() { String::new() } else { format!(": {}", line.trim()) }
}

/// Returns the innermost cause of an error. The outer errors of HTTP clients are no more than "transport error".
pub(super) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
