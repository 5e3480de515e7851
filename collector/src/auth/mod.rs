//! Authentication and authorization. Every gRPC and HTTP call passes through here before its service sees it.
//!
//! A caller proves its identity with a certificate of `--tls-client-ca`, or with a token that the Kubernetes API
//! confirms. Names and groups have roles. An agent's certificate or token also decides for which node it may speak.

mod layer;
mod roles;
mod token;

use std::{fmt::Write as _, sync::Arc};

use axum::{
    extract::ConnectInfo,
    http::{
        Extensions, HeaderMap,
        header::{AUTHORIZATION, ORIGIN},
    },
};
use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use tonic::Status;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use self::roles::Grant;
pub use self::roles::NodeIdentity;
pub(crate) use self::{
    layer::AuthLayer,
    roles::{AuthOptions, Role},
    token::{ReviewError, Reviewer},
};
use crate::peer::Peer;

/// An authenticated caller.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Caller {
    /// Name for messages and the audit log.
    pub(crate) display_name: String,
    names: Vec<String>,
    groups: Vec<String>,
    /// Nodes that the caller may speak for. `None`: any node.
    nodes: Option<Vec<String>>,
}

impl Caller {
    /// Reports whether the caller may speak for some nodes only.
    pub(crate) fn is_bound_to_nodes(&self) -> bool {
        self.nodes.is_some()
    }

    /// Returns PERMISSION_DENIED unless this caller may speak for the node.
    pub(crate) fn may_be_node(&self, node: &str) -> Result<(), Status> {
        match &self.nodes {
            None => Ok(()),
            Some(nodes) if nodes.iter().any(|name| name == node) => Ok(()),
            Some(nodes) => {
                let allowed = if nodes.is_empty() { "none".to_owned() } else { nodes.join(", ") };
                Err(Status::permission_denied(format!(
                    "hello.node is `{node}`, and {} may speak for: {allowed} (--node-identity)",
                    self.display_name
                )))
            }
        }
    }
}

/// Authenticates callers and checks their roles.
pub(crate) struct Auth {
    grants: Vec<Grant>,
    /// Callers must prove their identity.
    required: bool,
    node_identity: NodeIdentity,
    reviewer: Option<Reviewer>,
}

impl Auth {
    /// Builds the checks, and logs a warning if they let more callers in than an operator may expect.
    ///
    /// `has_client_ca`: the listeners verify client certificates. `is_local`: both listen on loopback addresses.
    pub(crate) fn new(
        options: &AuthOptions,
        has_client_ca: bool,
        is_local: bool,
        reviewer: Option<Reviewer>,
    ) -> Arc<Self> {
        let required = has_client_ca || reviewer.is_some();
        if !required && !is_local {
            tracing::warn!(
                "every client that can reach this collector may read profiles and change rules: give --tls-client-ca or \
                 --token-audience"
            );
        } else if required && options.role.is_empty() {
            tracing::warn!(
                "every authenticated client may read profiles and change rules: give --role to tell agents, viewers and \
                 editors apart"
            );
        }
        if required && options.node_identity == NodeIdentity::Any {
            tracing::warn!(
                "every client with the agent role may speak for every node: give --node-identity certificate or token to \
                 check the node's name against that proof"
            );
        }
        Arc::new(Self {
            grants: options.role.clone(),
            required,
            node_identity: options.node_identity,
            reviewer,
        })
    }

    /// Returns checks that let every call in, for `--debug-listen`.
    pub(crate) fn open() -> Arc<Self> {
        Arc::new(Self {
            grants: Vec::new(),
            required: false,
            node_identity: NodeIdentity::Any,
            reviewer: None,
        })
    }

    /// Returns the caller, or UNAUTHENTICATED if it must prove its identity and does not. UNAVAILABLE means that the
    /// Kubernetes API did not answer.
    pub(crate) async fn authenticate(
        &self,
        peer: Option<&Peer>,
        authorization: Option<&str>,
    ) -> Result<Caller, Status> {
        if !self.required {
            return Ok(Caller { display_name: "anonymous".into(), ..Caller::default() });
        }
        // A token belongs to this call. A certificate belongs to a connection, which a proxy may share among callers.
        if let (Some(reviewer), Some(token)) = (&self.reviewer, authorization.and_then(bearer)) {
            let reviewed = reviewer.review(token).await.map_err(|error| match error {
                ReviewError::Refused(_) => Status::unauthenticated(error.to_string()),
                ReviewError::Unreachable(_) => Status::unavailable(error.to_string()),
            })?;
            return Ok(Caller {
                display_name: reviewed.name.clone(),
                nodes: match self.node_identity {
                    NodeIdentity::Any => None,
                    NodeIdentity::Certificate => Some(Vec::new()),
                    NodeIdentity::Token => Some(reviewed.node.into_iter().collect()),
                },
                names: vec![reviewed.name],
                groups: reviewed.groups,
            });
        }
        if let Some(certificate) = peer.and_then(|peer| peer.certificate.as_ref()) {
            return Ok(self.caller_of(certificate));
        }
        let cure = match &self.reviewer {
            Some(_) => {
                "this collector answers only callers with a token (--token-file) or a certificate of its --tls-client-ca"
            }
            None => "this collector answers only clients with a certificate of its --tls-client-ca",
        };
        Err(Status::unauthenticated(cure))
    }

    /// Returns the caller of an HTTP request, or the error of [`Auth::authenticate`] or [`Auth::authorize`].
    ///
    /// A browser is no agent. A web page could otherwise make the browser of a user send profiles to a collector without
    /// authentication, because a browser sends such requests without asking the collector.
    pub(crate) async fn admit(
        &self,
        extensions: &Extensions,
        headers: &HeaderMap,
        role: Role,
    ) -> Result<Caller, Status> {
        if role == Role::Agent && (headers.contains_key(ORIGIN) || headers.contains_key("sec-fetch-site")) {
            return Err(Status::permission_denied("profiles are not accepted from web pages"));
        }
        let peer = extensions.get::<ConnectInfo<Peer>>().map(|info| info.0.clone());
        let token = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = token.map(str::to_owned);
        let caller = self.authenticate(peer.as_ref(), token.as_deref()).await;
        caller.and_then(|caller| self.authorize(&caller, role).map(|()| caller)).inspect_err(|status| {
            tracing::debug!(peer = ?peer.map(|p| p.addr), %status, "refused a request");
        })
    }

    fn caller_of(&self, der: &CertificateDer<'_>) -> Caller {
        let Identity { names, groups } = identity(der);
        let hash = Sha256::digest(der.as_ref());
        let fingerprint = hash.iter().take(16).fold(String::new(), |mut text, byte| {
            // Writing into a string does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        });
        let display_name = match names.first() {
            Some(name) => format!("{name} (certificate sha256:{fingerprint})"),
            None => format!("certificate sha256:{fingerprint}"),
        };
        let nodes = match self.node_identity {
            NodeIdentity::Any => None,
            NodeIdentity::Certificate => Some(names.clone()),
            NodeIdentity::Token => Some(Vec::new()),
        };
        Caller { display_name, names, groups, nodes }
    }

    /// Returns PERMISSION_DENIED unless the caller has the role.
    pub(crate) fn authorize(&self, caller: &Caller, role: Role) -> Result<(), Status> {
        if !self.required || self.grants.is_empty() {
            return Ok(());
        }
        if self.grants.iter().any(|grant| grant.covers(role, &caller.names, &caller.groups)) {
            return Ok(());
        }
        let name = caller.names.first().map_or("*", String::as_str);
        Err(Status::permission_denied(format!(
            "{} lacks the role {role} for this call: give the collector --role {role}={name}",
            caller.display_name
        )))
    }
}

/// Returns the token of `authorization: Bearer TOKEN`.
fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim()).filter(|token| !token.is_empty())
}

struct Identity {
    /// Common names, DNS names, URIs.
    names: Vec<String>,
    /// Organizations of the certificate, or groups of the token.
    groups: Vec<String>,
}

/// Reads names and groups from a verified certificate. An unreadable certificate has none.
fn identity(der: &CertificateDer<'_>) -> Identity {
    let mut identity = Identity { names: Vec::new(), groups: Vec::new() };
    let Ok((_, certificate)) = X509Certificate::from_der(der.as_ref()) else { return identity };
    let subject = certificate.subject();
    let text =
        |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| attribute.as_str().ok().map(str::to_owned);
    identity.names.extend(subject.iter_common_name().filter_map(text));
    identity.groups.extend(subject.iter_organization().filter_map(text));
    if let Ok(Some(alternatives)) = certificate.subject_alternative_name() {
        for name in &alternatives.value.general_names {
            if let GeneralName::DNSName(name) | GeneralName::URI(name) = name {
                identity.names.push((*name).to_owned());
            }
        }
    }
    identity
}
