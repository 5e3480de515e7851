//! Why a process does, or does not, match: field by field, in words. The patterns are those that decide.

use gannet_proto::{
    control::{Match, MatchedProcess},
    rules::Pattern,
};

use crate::process::Seen;

/// Texts of a list that are named; a rule may have 64 in each.
const SHOWN: usize = 4;

/// What a match asks for, ready to be compared.
pub(super) struct Wanted {
    comm: Vec<Pattern>,
    exe: Vec<Pattern>,
    cgroup: Vec<Pattern>,
    pids: Vec<u32>,
    uid: Vec<u32>,
    /// Fields over pods that are given.
    pods: Vec<&'static str>,
}

impl Wanted {
    pub(super) fn of(wanted: &Match) -> Self {
        let Match { comm, exe, cgroup, namespaces, pod_labels, containers, workloads, pids, uid } = wanted;
        // A pattern that does not parse was refused before; it can only be left out.
        let patterns = |texts: &[String]| texts.iter().filter_map(|text| Pattern::parse(text).ok()).collect();
        let pods = [
            ("match.namespaces", !namespaces.is_empty()),
            ("match.pod_labels", !pod_labels.is_empty()),
            ("match.containers", !containers.is_empty()),
            ("match.workloads", !workloads.is_empty()),
        ];
        Self {
            comm: patterns(comm),
            exe: patterns(exe),
            cgroup: patterns(cgroup),
            pids: pids.clone(),
            uid: uid.clone(),
            pods: pods.into_iter().filter(|(_, given)| *given).map(|(field, _)| field).collect(),
        }
    }

    /// One line for each field that does not hold; none: it matches. `pod`: why the fields over pods do not hold, given
    /// that there are any.
    pub(super) fn mismatches(
        &self,
        seen: &Seen,
        pod: impl FnOnce(&[&'static str]) -> Vec<String>,
    ) -> Vec<String> {
        let mut found = Vec::new();
        for (field, patterns, text) in [
            ("match.comm", &self.comm, &seen.comm),
            ("match.exe", &self.exe, &seen.exe),
            ("match.cgroup", &self.cgroup, &seen.cgroup),
        ] {
            if !patterns.is_empty() && !patterns.iter().any(|pattern| pattern.matches(text.as_bytes())) {
                let wanted: Vec<String> = patterns.iter().take(SHOWN).map(show).collect();
                let more = if patterns.len() > SHOWN { ", ..." } else { "" };
                found.push(format!("{field}: is `{text}`, not {}{more}", wanted.join(" or ")));
            }
        }
        if !self.pids.is_empty() && !self.pids.contains(&seen.pid) {
            found.push(format!("match.pids: is {}", seen.pid));
        }
        if !self.uid.is_empty() && !seen.uid.is_some_and(|uid| self.uid.contains(&uid)) {
            let is = seen.uid.map_or_else(|| "unknown".to_owned(), |uid| uid.to_string());
            found.push(format!("match.uid: is {is}"));
        }
        if !self.pods.is_empty() {
            found.extend(pod(&self.pods));
        }
        found
    }
}

fn show(pattern: &Pattern) -> String {
    format!("`{}{}`", pattern.text(), if pattern.is_prefix() { "*" } else { "" })
}

/// As it is told.
pub(super) fn matched(seen: &Seen, cpus: f64) -> MatchedProcess {
    MatchedProcess {
        pid: seen.pid,
        comm: seen.comm.clone(),
        exe: seen.exe.clone(),
        cgroup: seen.cgroup.clone(),
        cpus,
        ..MatchedProcess::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_that_does_not_hold_is_named_and_all_that_hold_are_a_match() {
        let seen = Seen {
            pid: 7,
            comm: "nginx".into(),
            exe: "/usr/sbin/nginx".into(),
            cgroup: "/system.slice/nginx.service".into(),
            uid: Some(33),
            ..Seen::default()
        };
        let wanted = Match {
            comm: vec!["ngin*".into()],
            exe: vec!["/usr/sbin/nginx".into()],
            cgroup: vec!["/system.slice/*".into()],
            uid: vec![0, 33],
            pids: vec![7],
            ..Match::default()
        };
        let none = |_: &[&'static str]| Vec::new();
        assert_eq!(Wanted::of(&wanted).mismatches(&seen, none), Vec::<String>::new());
        let other = Match {
            comm: vec!["python3*".into(), "node".into()],
            uid: vec![0],
            namespaces: vec!["shop".into()],
            ..wanted
        };
        let found = Wanted::of(&other)
            .mismatches(&seen, |fields| fields.iter().map(|field| format!("{field}: unknown")).collect());
        assert_eq!(
            found,
            [
                "match.comm: is `nginx`, not `python3*` or `node`",
                "match.uid: is 33",
                "match.namespaces: unknown"
            ]
        );
    }
}
