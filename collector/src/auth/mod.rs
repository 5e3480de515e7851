//! Who calls, and what they may: every call passes through here before any other room sees it.
//!
//! A caller proves who they are by a certificate of `--tls-client-ca`, or by a token that the Kubernetes API vouches for.
//! Roles are given to names and groups. An agent's certificate or token also says for which node it may speak.

mod token;

use std::{
    fmt::{self, Write as _},
    future::Future,
    pin::Pin,
    str::FromStr,
    sync::Arc,
    task::{Context, Poll},
};

use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use tonic::{Status, body::Body};
use tower::{Layer, Service};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

pub(crate) use self::token::{ReviewError, Reviewer};
use crate::{config::Config, tls::Peer};

/// What somebody may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Speak for a node: connect, push profiles.
    Agent,
    /// Read everything.
    Viewer,
    /// Read everything, change rules, start captures.
    Editor,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Agent => "agent",
            Self::Viewer => "viewer",
            Self::Editor => "editor",
        })
    }
}

/// A role, and whom it is given to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    role: Role,
    to: Grantee,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Grantee {
    Everybody,
    Name(String),
    Group(String),
}

impl FromStr for Grant {
    type Err = String;

    /// `editor=anna`, `viewer=group:developers`, `agent=*`.
    fn from_str(text: &str) -> Result<Self, String> {
        let form = || {
            format!(
                "`{text}` is no role: write agent=WHO, viewer=WHO or editor=WHO, where WHO is a name, group:NAME or *"
            )
        };
        let (role, to) = text.split_once('=').ok_or_else(form)?;
        let role = match role {
            "agent" => Role::Agent,
            "viewer" => Role::Viewer,
            "editor" => Role::Editor,
            _ => return Err(form()),
        };
        let to = match (to, to.strip_prefix("group:")) {
            ("" | "group:", _) => return Err(form()),
            ("*", _) => Grantee::Everybody,
            (_, Some(group)) => Grantee::Group(group.to_owned()),
            (name, None) => Grantee::Name(name.to_owned()),
        };
        Ok(Self { role, to })
    }
}

/// What an agent's claim to be a node is held against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeIdentity {
    /// Nothing: agents share one certificate, or need none.
    #[default]
    Any,
    /// The names in its certificate, of which one must be the node's.
    Certificate,
    /// The node of the pod that its token is bound to, as the Kubernetes API says.
    Token,
}

impl FromStr for NodeIdentity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "any" => Ok(Self::Any),
            "certificate" => Ok(Self::Certificate),
            "token" => Ok(Self::Token),
            _ => Err(format!("`{text}` is not known: write any, certificate or token")),
        }
    }
}

/// A caller, as proven.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Who {
    /// For people and the audit.
    pub(crate) shown: String,
    names: Vec<String>,
    groups: Vec<String>,
    /// The nodes that it may speak for; none: any.
    nodes: Option<Vec<String>>,
}

impl Who {
    /// It may not speak for every node.
    pub(crate) fn is_bound_to_nodes(&self) -> bool {
        self.nodes.is_some()
    }

    /// Fails unless this caller may speak for the node.
    pub(crate) fn may_be_node(&self, node: &str) -> Result<(), Status> {
        match &self.nodes {
            None => Ok(()),
            Some(nodes) if nodes.iter().any(|name| name == node) => Ok(()),
            Some(nodes) => {
                let of = if nodes.is_empty() { "none".to_owned() } else { nodes.join(", ") };
                Err(Status::permission_denied(format!(
                    "hello.node is `{node}`, and {} may speak for: {of} (--node-identity)",
                    self.shown
                )))
            }
        }
    }
}

/// Proves and allows.
pub(crate) struct Auth {
    grants: Vec<Grant>,
    /// Callers must prove who they are.
    required: bool,
    node_identity: NodeIdentity,
    reviewer: Option<Reviewer>,
}

impl Auth {
    pub(crate) fn new(config: &Config, reviewer: Option<Reviewer>) -> Arc<Self> {
        let with_client_ca = config.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        let required = with_client_ca || reviewer.is_some();
        let is_local = config.listen.ip().is_loopback() && config.http.ip().is_loopback();
        if !required && !is_local {
            tracing::warn!(
                "everybody who can reach this collector may read profiles and change rules: give --tls-client-ca or \
                 --token-audience"
            );
        } else if required && config.roles.is_empty() {
            tracing::warn!(
                "everybody who can prove who they are may read profiles and change rules: give --role to tell agents, \
                 viewers and editors apart"
            );
        }
        if required && config.node_identity == NodeIdentity::Any {
            tracing::warn!(
                "whoever may be an agent may speak for every node: give --node-identity certificate or token to hold the \
                 node's name against what it proves"
            );
        }
        Arc::new(Self {
            grants: config.roles.clone(),
            required,
            node_identity: config.node_identity,
            reviewer,
        })
    }

    /// Everybody may do everything: for what only this machine can reach.
    pub(crate) fn open() -> Arc<Self> {
        Arc::new(Self {
            grants: Vec::new(),
            required: false,
            node_identity: NodeIdentity::Any,
            reviewer: None,
        })
    }

    /// Who calls. UNAUTHENTICATED if they must prove it and do not.
    pub(crate) async fn who(&self, peer: Option<&Peer>, authorization: Option<&str>) -> Result<Who, Status> {
        if !self.required {
            return Ok(Who { shown: "anonymous".into(), ..Who::default() });
        }
        // A token is about this call, a certificate about a connection that many may share.
        if let (Some(reviewer), Some(token)) = (&self.reviewer, authorization.and_then(bearer)) {
            let reviewed = reviewer.review(token).await.map_err(|error| match error {
                ReviewError::Refused(_) => Status::unauthenticated(error.to_string()),
                ReviewError::Unreachable(_) => Status::unavailable(error.to_string()),
            })?;
            return Ok(Who {
                shown: reviewed.name.clone(),
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
            return Ok(self.certificate(certificate));
        }
        let how = match &self.reviewer {
            Some(_) => {
                "this collector answers only callers with a token (--token-file) or a certificate of its --tls-client-ca"
            }
            None => "this collector answers only clients with a certificate of its --tls-client-ca",
        };
        Err(Status::unauthenticated(how))
    }

    fn certificate(&self, der: &CertificateDer<'_>) -> Who {
        let Identity { names, groups } = identity(der);
        let hash = Sha256::digest(der.as_ref());
        let print = hash.iter().take(16).fold(String::new(), |mut print, byte| {
            // Writing into a string does not fail.
            let _ = write!(print, "{byte:02x}");
            print
        });
        let shown = match names.first() {
            Some(name) => format!("{name} (certificate sha256:{print})"),
            None => format!("certificate sha256:{print}"),
        };
        let nodes = match self.node_identity {
            NodeIdentity::Any => None,
            NodeIdentity::Certificate => Some(names.clone()),
            NodeIdentity::Token => Some(Vec::new()),
        };
        Who { shown, names, groups, nodes }
    }

    /// Fails unless the caller has the role.
    pub(crate) fn allow(&self, who: &Who, role: Role) -> Result<(), Status> {
        if !self.required || self.grants.is_empty() {
            return Ok(());
        }
        let holds = |grant: &Grant| {
            let fits = grant.role == role || (grant.role == Role::Editor && role == Role::Viewer);
            fits && match &grant.to {
                Grantee::Everybody => true,
                Grantee::Name(name) => who.names.contains(name),
                Grantee::Group(group) => who.groups.contains(group),
            }
        };
        if self.grants.iter().any(holds) {
            return Ok(());
        }
        let name = who.names.first().map_or("*", String::as_str);
        Err(Status::permission_denied(format!(
            "{} may not do this: it takes the role {role}, which --role {role}={name} at the collector would give",
            who.shown
        )))
    }
}

/// The token of `authorization: Bearer TOKEN`.
fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim()).filter(|token| !token.is_empty())
}

struct Identity {
    /// Common name, DNS names, URIs.
    names: Vec<String>,
    /// Organizations.
    groups: Vec<String>,
}

/// What a certificate says of its owner. It has been verified; one that cannot be read says nothing.
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

/// What a call takes; none: anybody may, as for probes.
fn role_of(path: &str) -> Option<Role> {
    let mut parts = path.trim_start_matches('/').splitn(2, '/');
    let (service, method) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    match service {
        "grpc.health.v1.Health"
        | "grpc.reflection.v1.ServerReflection"
        | "grpc.reflection.v1alpha.ServerReflection" => None,
        "gannet.control.v1.AgentService" | "gannet.ingest.v1.IngestService" => Some(Role::Agent),
        "gannet.query.v1.QueryService" => Some(Role::Viewer),
        _ => match method {
            "GetTriggers" | "ListScopes" | "GetRollout" | "WatchRollout" | "ListAudit" | "ListNodes"
            | "Explain" => Some(Role::Viewer),
            // What is new takes the most until it is said here.
            _ => Some(Role::Editor),
        },
    }
}

/// Puts [`Auth`] before all gRPC services.
#[derive(Clone)]
pub(crate) struct AuthLayer(pub(crate) Arc<Auth>);

impl<S> Layer<S> for AuthLayer {
    type Service = AuthService<S>;

    fn layer(&self, inner: S) -> AuthService<S> {
        AuthService { auth: Arc::clone(&self.0), inner }
    }
}

/// A service whose callers are known and allowed.
#[derive(Clone)]
pub(crate) struct AuthService<S> {
    auth: Arc<Auth>,
    inner: S,
}

impl<S> Service<http::Request<Body>> for AuthService<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        // The one that is ready is the one that is called.
        let fresh = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, fresh);
        let auth = Arc::clone(&self.auth);
        Box::pin(async move {
            let Some(role) = role_of(request.uri().path()) else { return inner.call(request).await };
            let peer = request.extensions().get::<Peer>().cloned();
            let token = request.headers().get(http::header::AUTHORIZATION).and_then(|v| v.to_str().ok());
            let token = token.map(str::to_owned);
            let who = auth.who(peer.as_ref(), token.as_deref()).await;
            match who.and_then(|who| auth.allow(&who, role).map(|()| who)) {
                Ok(who) => {
                    request.extensions_mut().insert(who);
                    inner.call(request).await
                }
                Err(status) => {
                    tracing::debug!(path = request.uri().path(), peer = ?peer.map(|p| p.addr), %status, "refused");
                    Ok(status.into_http())
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("editor=anna", Some((Role::Editor, Grantee::Name("anna".into()))))]
    #[case("agent=*", Some((Role::Agent, Grantee::Everybody)))]
    #[case("viewer=group:dev", Some((Role::Viewer, Grantee::Group("dev".into()))))]
    #[case("viewer=system:serviceaccount:gannet:x", Some((Role::Viewer, Grantee::Name("system:serviceaccount:gannet:x".into()))))]
    #[case("owner=anna", None)]
    #[case("viewer=", None)]
    #[case("viewer=group:", None)]
    #[case("viewer", None)]
    fn roles_are_read(#[case] text: &str, #[case] want: Option<(Role, Grantee)>) {
        match (text.parse::<Grant>(), want) {
            (Ok(grant), Some((role, to))) => assert_eq!(grant, Grant { role, to }),
            (Err(words), None) => assert!(words.contains("group:NAME"), "{words}"),
            (found, want) => panic!("{found:?}, not {want:?}"),
        }
    }

    #[rstest]
    #[case("/gannet.control.v1.TriggerService/SetTriggers", Some(Role::Editor))]
    #[case("/gannet.control.v1.TriggerService/GetTriggers", Some(Role::Viewer))]
    #[case("/gannet.control.v1.FleetService/Capture", Some(Role::Editor))]
    #[case("/gannet.control.v1.FleetService/ListNodes", Some(Role::Viewer))]
    #[case("/gannet.control.v1.AgentService/Connect", Some(Role::Agent))]
    #[case("/gannet.ingest.v1.IngestService/Push", Some(Role::Agent))]
    #[case("/gannet.query.v1.QueryService/Top", Some(Role::Viewer))]
    #[case("/grpc.health.v1.Health/Check", None)]
    #[case("/unknown/Method", Some(Role::Editor))]
    #[case("", Some(Role::Editor))]
    fn each_call_takes_its_role(#[case] path: &str, #[case] role: Option<Role>) {
        assert_eq!(role_of(path), role);
    }

    #[test]
    fn every_method_that_is_served_has_its_role_written_down() {
        use prost::Message as _;
        let set = prost_types::FileDescriptorSet::decode(gannet_proto::DESCRIPTORS).unwrap();
        let editors = ["SetTriggers", "DeleteTriggers", "ResumeRollout", "AbortRollout", "Capture"];
        let mut seen = 0;
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let is_editors = role_of(&path) == Some(Role::Editor);
                    assert_eq!(is_editors, editors.contains(&method.name()), "{path}");
                    seen += usize::from(is_editors);
                }
            }
        }
        assert_eq!(seen, editors.len());
    }
}
