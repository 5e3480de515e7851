//! Why pod feeds fail, and what to do about it.

use std::{io, path::PathBuf};

/// The error of a pod feed, with what to do about it.
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
        /// Path of the file.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
        /// Advice for the user.
        cure: &'static str,
    },
    /// The configured address is invalid.
    #[error("`{0}` is no address of a kubelet: write HOST, HOST:PORT or https://HOST:PORT, IPv6 in brackets")]
    Address(String),
    /// A certificate file is invalid.
    #[error("the certificates in {} cannot be used: {reason}", path.display())]
    Certificates {
        /// Path of the file.
        path: PathBuf,
        /// The error of the parser.
        reason: String,
    },
    /// The server does not answer.
    #[error("cannot reach {at}: {reason}")]
    Unreachable {
        /// Name of the server for people.
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
        /// Name of the server for people.
        at: String,
        /// The error of the verifier.
        reason: String,
    },
    /// The server's certificate is for other names.
    #[error(
        "{at} shows a certificate of the right authority for other names: {reason}; set --kubelet-address to a name or address \
         in the certificate, --node to the name of this node, or give the certificate with --kubelet-certificate"
    )]
    WrongName {
        /// Name of the server for people.
        at: String,
        /// The error of the verifier, with the names.
        reason: String,
    },
    /// The server answered 401.
    #[error(
        "{at} does not know the token (401): is {} of this cluster, and does the kubelet run with webhook \
         authentication (authentication.webhook.enabled)?",
        token.display()
    )]
    Unauthenticated {
        /// Name of the server for people.
        at: String,
        /// The token's file.
        token: PathBuf,
    },
    /// The server answered 403.
    #[error("{at} does not allow it (403){said}; the service account needs a ClusterRole with {rule}")]
    Forbidden {
        /// Name of the server for people.
        at: String,
        /// The server's text behind `": "`, or empty.
        said: String,
        /// The missing rule of the ClusterRole.
        rule: &'static str,
    },
    /// The server answered with another status than 200.
    #[error("{at} answered {status}{said}")]
    Status {
        /// Name of the server for people.
        at: String,
        /// The HTTP status.
        status: u16,
        /// The server's text behind `": "`, or empty.
        said: String,
    },
    /// The server took too long.
    #[error("{at} did not answer within {seconds} s")]
    Timeout {
        /// Name of the server for people.
        at: String,
        /// The time limit in seconds.
        seconds: u64,
    },
    /// The answer is too large.
    #[error("{at} answered with more than {max_bytes} bytes, which is no list of one node's pods")]
    TooLarge {
        /// Name of the server for people.
        at: String,
        /// The limit for an answer.
        max_bytes: u64,
    },
    /// The answer is no list of pods.
    #[error("{at} answered with something else than pods: {reason}")]
    Invalid {
        /// Name of the server for people.
        at: String,
        /// The error of the parser.
        reason: String,
    },
    /// The server ended the stream.
    #[error("{at} ended the stream{said}")]
    Ended {
        /// Name of the server for people.
        at: String,
        /// The server's text behind `": "`, or empty.
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
