//! Roles, the grants of `--role`, and the role that each gRPC method requires.

use std::{fmt, str::FromStr};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// Requirements for callers of the collector.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[command(next_help_heading = "Authentication and roles")]
#[serde(default)]
pub struct AuthOptions {
    /// Give a role to authenticated callers: agent=WHO, viewer=WHO or editor=WHO (repeatable). WHO is a name in a
    /// certificate (common name, DNS name, URI) or of a service account, group:NAME (organization of a certificate, group of
    /// a token), or *. Without it every authenticated caller may do everything
    #[arg(long, value_name = "ROLE=WHO", env = "GANNET_COLLECTOR_ROLE", value_delimiter = ',')]
    pub role: Vec<Grant>,
    /// Proof that an agent must give for its node name
    #[arg(long, value_name = "PROOF", env = "GANNET_COLLECTOR_NODE_IDENTITY", default_value = "any")]
    pub node_identity: NodeIdentity,
    /// Accept tokens of Kubernetes service accounts with this audience; the collector must be allowed to create tokenreviews
    #[arg(long, value_name = "AUDIENCE", env = "GANNET_COLLECTOR_TOKEN_AUDIENCE")]
    pub token_audience: Option<String>,
}

impl Default for AuthOptions {
    fn default() -> Self {
        gannet_base::defaults()
    }
}

/// The rights of a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Connect as a node and push profiles.
    Agent,
    /// Read profiles, nodes and rules.
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

/// A role and the callers that have it, as one `--role` names them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    role: Role,
    to: Grantee,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Grantee {
    Everyone,
    Name(String),
    Group(String),
}

impl Grant {
    /// Reports whether this grant gives a caller with these names and groups the role. An editor is a viewer too.
    pub(super) fn covers(&self, role: Role, names: &[String], groups: &[String]) -> bool {
        let has_role = self.role == role || (self.role == Role::Editor && role == Role::Viewer);
        has_role
            && match &self.to {
                Grantee::Everyone => true,
                Grantee::Name(name) => names.contains(name),
                Grantee::Group(group) => groups.contains(group),
            }
    }
}

impl FromStr for Grant {
    type Err = String;

    /// Parses `editor=anna`, `viewer=group:developers`, `agent=*`.
    fn from_str(text: &str) -> Result<Self, String> {
        let invalid = || {
            format!(
                "`{text}` is no role: write agent=WHO, viewer=WHO or editor=WHO, where WHO is a name, group:NAME or *"
            )
        };
        let (role, to) = text.split_once('=').ok_or_else(invalid)?;
        let role = match role {
            "agent" => Role::Agent,
            "viewer" => Role::Viewer,
            "editor" => Role::Editor,
            _ => return Err(invalid()),
        };
        let to = match (to, to.strip_prefix("group:")) {
            ("" | "group:", _) => return Err(invalid()),
            ("*", _) => Grantee::Everyone,
            (_, Some(group)) => Grantee::Group(group.to_owned()),
            (name, None) => Grantee::Name(name.to_owned()),
        };
        Ok(Self { role, to })
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            Grantee::Everyone => write!(f, "{}=*", self.role),
            Grantee::Name(name) => write!(f, "{}={name}", self.role),
            Grantee::Group(group) => write!(f, "{}=group:{group}", self.role),
        }
    }
}

/// The proof that an agent must give for its node name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum NodeIdentity {
    /// None: agents share one certificate, or need none
    #[default]
    Any,
    /// A certificate with the node's name among its names
    Certificate,
    /// A token that is bound to a pod of the node
    Token,
}

gannet_base::serde_as_text!(Grant);

/// Returns the role that a gRPC method requires. `None` for probes and reflection, which need no role.
pub(super) fn required_role(path: &str) -> Option<Role> {
    let mut parts = path.trim_start_matches('/').splitn(2, '/');
    let (service, method) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    match service {
        "grpc.health.v1.Health"
        | "grpc.reflection.v1.ServerReflection"
        | "grpc.reflection.v1alpha.ServerReflection" => None,
        "gannet.control.v1.AgentService"
        | "gannet.debuginfo.v1.AgentDebugInfoService"
        | "gannet.ingest.v1.IngestService"
        | "opentelemetry.proto.collector.profiles.v1development.ProfilesService" => Some(Role::Agent),
        "gannet.query.v1.QueryService" => Some(Role::Viewer),
        _ => match method {
            "GetTriggers" | "ListScopes" | "GetRollout" | "WatchRollout" | "ListAudit" | "ListNodes"
            | "Explain" | "ListDebugInfo" | "ListDeletions" => Some(Role::Viewer),
            // A new method requires the highest role until this list names it.
            _ => Some(Role::Editor),
        },
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("editor=anna", Some((Role::Editor, Grantee::Name("anna".into()))))]
    #[case("agent=*", Some((Role::Agent, Grantee::Everyone)))]
    #[case("viewer=group:dev", Some((Role::Viewer, Grantee::Group("dev".into()))))]
    #[case("viewer=system:serviceaccount:gannet:x", Some((Role::Viewer, Grantee::Name("system:serviceaccount:gannet:x".into()))))]
    #[case("owner=anna", None)]
    #[case("viewer=", None)]
    #[case("viewer=group:", None)]
    #[case("viewer", None)]
    fn grants_round_trip(#[case] text: &str, #[case] want: Option<(Role, Grantee)>) {
        match (text.parse::<Grant>(), want) {
            (Ok(grant), Some((role, to))) => {
                assert_eq!(grant, Grant { role, to });
                assert_eq!(grant.to_string(), text);
            }
            (Err(error), None) => assert!(error.contains("group:NAME"), "{error}"),
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
    #[case("/opentelemetry.proto.collector.profiles.v1development.ProfilesService/Export", Some(Role::Agent))]
    #[case("/gannet.query.v1.QueryService/Top", Some(Role::Viewer))]
    #[case("/gannet.query.v1.DeletionService/DeleteProfiles", Some(Role::Editor))]
    #[case("/gannet.query.v1.DeletionService/ListDeletions", Some(Role::Viewer))]
    #[case("/grpc.health.v1.Health/Check", None)]
    #[case("/unknown/Method", Some(Role::Editor))]
    #[case("", Some(Role::Editor))]
    fn each_method_requires_its_role(#[case] path: &str, #[case] role: Option<Role>) {
        assert_eq!(required_role(path), role);
    }

    /// Checks that a new method in the proto files cannot become an editor's by oversight.
    #[test]
    fn only_the_listed_methods_require_the_editor_role() {
        use prost::Message as _;
        let set = prost_types::FileDescriptorSet::decode(gannet_proto::DESCRIPTORS).unwrap();
        let editors = [
            "SetTriggers",
            "DeleteTriggers",
            "ResumeRollout",
            "AbortRollout",
            "Capture",
            "UploadDebugInfo",
            "DeleteDebugInfo",
            "DeleteProfiles",
        ];
        let mut seen = 0;
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let is_editors = required_role(&path) == Some(Role::Editor);
                    assert_eq!(is_editors, editors.contains(&method.name()), "{path}");
                    seen += usize::from(is_editors);
                }
            }
        }
        assert_eq!(seen, editors.len());
    }
}
