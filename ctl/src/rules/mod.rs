//! Rules: list, show, delete and apply them, and explain what they do.

mod apply;
mod explain;

use std::time::Duration;

pub(crate) use apply::validate;
pub(crate) use explain::explain;
use gannet_proto::{
    control::{
        DeleteTriggersRequest, ExplainRequest, GetTriggersRequest, ListAuditRequest, ListScopesRequest, Rule,
        RuleScope, SetTriggersRequest, Staging,
    },
    rules,
};
use serde_json::{Value, json};

use crate::{
    args::{Format, Rules, ScopeArg},
    audit,
    client::Collector,
    error::Error,
    render::{Console, ago, millis, show_time, table},
    rollout,
};

pub(crate) async fn run(
    command: Rules,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    match command {
        Rules::Apply { files, scope, etag, allow_empty, dry_run, canary, soak, wait, timeout } => {
            let rules = apply::read(&files)?;
            if rules.is_empty() && !allow_empty {
                return Err(Error::Usage(format!(
                    "the files hold no rules, so applying them would remove all rules of scope `{}`; give \
                     --allow-empty to do that",
                    scope.scope
                )));
            }
            let request = SetTriggersRequest {
                scope: scope.scope.clone(),
                rules,
                etag: etag.unwrap_or_default(),
                request_id: String::new(),
                allow_empty,
                validate_only: dry_run,
                staging: canary
                    .map(|percent| Staging { percent, soak: soak.and_then(|soak| soak.0.try_into().ok()) }),
            };
            let revision = apply::set(request, collector, format, console).await?;
            if wait {
                rollout::watch(collector, revision, false, timeout.map(Duration::from), format, console).await
            } else {
                Ok(())
            }
        }
        Rules::List { scope } => list(scope.as_deref(), collector, format, console).await,
        Rules::Show { id, scope } => show(id.as_deref(), &scope, collector, format, console).await,
        Rules::Delete { ids, all, scope, etag } => {
            let etag = etag.unwrap_or_default();
            delete(&ids, all, scope.scope, etag, collector, format, console).await
        }
        Rules::Explain { id, node, scope, pid, limit } => {
            let request = ExplainRequest { node, rule_id: id, pid, limit };
            explain(request, scope.as_deref(), collector, format, console).await
        }
        Rules::Audit { scope, node, limit } => {
            audit::list(ListAuditRequest { scope, node, limit }, collector, format, console).await
        }
        Rules::Validate { files } => apply::validate(&files, format, console),
    }
}

/// Returns all scopes, or the one named `only`, with the newest revision.
async fn scopes(only: Option<&str>, collector: &Collector) -> Result<(Vec<RuleScope>, u64), Error> {
    let answer = collector.triggers().list_scopes(ListScopesRequest {}).await;
    let answer = answer.map_err(|status| collector.fault(&status))?.into_inner();
    let scopes: Vec<_> =
        answer.scopes.into_iter().filter(|scope| only.is_none_or(|only| only == scope.scope)).collect();
    match only {
        Some(only) if scopes.is_empty() => {
            Err(Error::Failed(format!("the collector has no scope `{only}`; `rules list` shows all scopes")))
        }
        _ => Ok((scopes, answer.revision)),
    }
}

async fn list(
    only: Option<&str>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let (scopes, revision) = scopes(only, collector).await?;
    let value = || {
        let scopes: Vec<_> = scopes
            .iter()
            .map(|scope| {
                json!({
                    "scope": scope.scope, "etag": scope.etag, "revision": scope.revision,
                    "changed_at_ms": millis(scope.changed_at), "changed_by": scope.changed_by,
                    "rules": scope.rules.iter().map(rules::to_json).collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({ "revision": revision, "scopes": scopes })
    };
    console.show(format, value, || {
        let rows: Vec<_> =
            scopes.iter().flat_map(|scope| scope.rules.iter().map(|rule| row(scope, rule))).collect();
        if rows.is_empty() {
            return "no rules\n".to_owned();
        }
        table(["SCOPE", "RULE", "MATCH", "WHEN", ">HZ", "TTL", "REVISION", "CHANGED", "BY"], &rows)
    })
}

fn row(scope: &RuleScope, rule: &Rule) -> [String; 9] {
    let form = rules::to_json(rule);
    let when = match form["when"].as_array() {
        Some(when) => {
            let names: Vec<_> =
                when.iter().filter_map(|when| when.as_object()?.keys().next().cloned()).collect();
            names.join(",")
        }
        None => "always".to_owned(),
    };
    [
        scope.scope.clone(),
        rule.id.clone(),
        shorten(&brief(&form["match"]), 48),
        when,
        rules::effective_hz(rule).to_string(),
        form["lifetime"]["ttl"].as_str().unwrap_or("-").to_owned(),
        scope.revision.to_string(),
        ago(scope.changed_at),
        shorten(&scope.changed_by, 24),
    ]
}

/// Formats a match in one line: `comm=python3*|node pids=7`.
fn brief(matches: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
    let fields: Vec<_> = matches
        .as_object()
        .into_iter()
        .flatten()
        .map(|(field, value)| match value.as_array() {
            Some(list) => format!("{field}={}", list.iter().map(text).collect::<Vec<_>>().join("|")),
            None => format!("{field}={}", text(value)),
        })
        .collect();
    fields.join(" ")
}

fn shorten(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

async fn scope_of(scope: &str, collector: &Collector) -> Result<RuleScope, Error> {
    let answer = collector.triggers().get_triggers(GetTriggersRequest { scope: scope.to_owned() }).await;
    let answer = answer.map_err(|status| collector.fault(&status))?.into_inner();
    answer.scope.ok_or_else(|| {
        Error::Failed(format!("the collector has no scope `{scope}`; `rules list` shows all scopes"))
    })
}

fn missing(id: &str, scope: &RuleScope) -> Error {
    let ids: Vec<_> = scope.rules.iter().map(|rule| rule.id.as_str()).collect();
    let ids = if ids.is_empty() { "no rules".to_owned() } else { ids.join(", ") };
    Error::Failed(format!("scope `{}` has no rule `{id}`; it has {ids}", scope.scope))
}

async fn show(
    id: Option<&str>,
    scope: &ScopeArg,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let scope = scope_of(&scope.scope, collector).await?;
    let chosen: Vec<Rule> =
        scope.rules.iter().filter(|rule| id.is_none_or(|id| id == rule.id)).cloned().collect();
    if let (Some(id), []) = (id, chosen.as_slice()) {
        return Err(missing(id, &scope));
    }
    // A rule does not fit into a table, so people get it as YAML.
    let yaml = || {
        let RuleScope { scope, etag, revision, changed_at, changed_by, .. } = &scope;
        format!(
            "# scope {scope}, revision {revision}, etag {etag}, changed {} by {changed_by}\n{}",
            show_time(*changed_at),
            rules::to_yaml(&chosen)
        )
    };
    match format {
        Format::Table | Format::Yaml => console.show(Format::Table, || Value::Null, yaml),
        Format::Json => {
            let rules: Vec<_> = chosen.iter().map(rules::to_json).collect();
            console.show(format, || json!({ "rules": rules }), String::new)
        }
    }
}

async fn delete(
    ids: &[String],
    all: bool,
    scope: String,
    etag: String,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    if all {
        let request = DeleteTriggersRequest { scope: scope.clone(), etag, request_id: String::new() };
        let answer = collector.triggers().delete_triggers(request).await;
        let revision = answer.map_err(|status| collector.fault(&status))?.into_inner().revision;
        return console.show(
            format,
            || json!({ "scope": scope, "revision": revision }),
            || format!("deleted scope `{scope}`, revision {revision}\n"),
        );
    }
    let current = scope_of(&scope, collector).await?;
    if let Some(id) = ids.iter().find(|id| current.rules.iter().all(|rule| rule.id != **id)) {
        return Err(missing(id, &current));
    }
    let request = SetTriggersRequest {
        scope,
        rules: current.rules.into_iter().filter(|rule| !ids.contains(&rule.id)).collect(),
        // The etag makes the collector refuse the change if the scope changed since it was read.
        etag: if etag.is_empty() { current.etag } else { etag },
        allow_empty: true,
        ..SetTriggersRequest::default()
    };
    apply::set(request, collector, format, console).await.map(drop)
}
