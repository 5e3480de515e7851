//! Checks for tests: declarations that follow the conventions, and scrapes that show only what is declared.

use std::collections::BTreeSet;

use super::{Metric, MetricKind};

/// Returns what is wrong with declarations by the conventions of Prometheus; empty if nothing is.
pub fn problems(metrics: &[Metric]) -> Vec<String> {
    let mut problems = Vec::new();
    let (mut names, mut helps) = (BTreeSet::new(), BTreeSet::new());
    for metric in metrics {
        let Metric { name, kind, help, labels } = metric;
        let mut wrong = |what: &str| problems.push(format!("{name}: {what}"));
        if !names.insert(name) {
            wrong("the name is declared twice");
        }
        if !helps.insert(help) {
            wrong("another metric has the same help text");
        }
        if (*kind == MetricKind::Counter) != name.ends_with("_total") {
            wrong("counters, and only counters, end with _total");
        }
        if name.contains("_age_") || name.contains("milliseconds") || name.contains("_kib") {
            wrong("use base units, and the time of an event instead of its age");
        }
        if help.is_empty()
            || help.ends_with('.')
            || !help.starts_with(|c: char| c.is_ascii_uppercase() || c == '1')
        {
            wrong("the help is one sentence without a full stop");
        }
        let plain = |text: &str| {
            text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte.is_ascii_digit())
        };
        if !plain(name) || !labels.iter().all(|label| plain(label)) {
            wrong("names and labels are snake_case");
        }
    }
    problems
}

/// Returns what the OpenMetrics text of a scrape shows differently from the declarations: metrics that are not
/// declared, other types, other help texts, other labels. Empty if nothing differs.
pub fn undeclared(text: &str, declared: &[&[Metric]]) -> Vec<String> {
    let find = |family: &str| {
        declared.iter().copied().flatten().find(|metric| {
            metric.family() == family
                || metric.name == family
                || (metric.kind == MetricKind::Histogram
                    && ["_bucket", "_sum", "_count"]
                        .iter()
                        .any(|suffix| family.strip_suffix(suffix) == Some(metric.name)))
        })
    };
    let mut problems = BTreeSet::new();
    for line in text.lines().filter(|line| !line.is_empty() && *line != "# EOF") {
        let (name, expected, shown) = if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (family, shown) = rest.split_once(' ').unwrap_or((rest, ""));
            (family, find(family).map(|metric| metric.kind.as_str().to_owned()), shown.to_owned())
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            let (family, shown) = rest.split_once(' ').unwrap_or((rest, ""));
            (family, find(family).map(|metric| format!("{}.", metric.help)), shown.to_owned())
        } else if line.starts_with('#') {
            continue;
        } else {
            let (series, _) = line.rsplit_once(' ').unwrap_or((line, ""));
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            (name, find(name).map(|metric| metric.labels.join(",")), label_names(labels).join(","))
        };
        match expected {
            None => drop(problems.insert(format!("{name} is not declared"))),
            Some(expected) if expected != shown => {
                problems.insert(format!("{name}: `{expected}` is declared, the scrape shows `{shown}`"));
            }
            Some(_) => {}
        }
    }
    problems.into_iter().collect()
}

/// Returns the names in `a="…",b="…"}`, without the `le` of histograms.
fn label_names(labels: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut rest = labels.trim_end_matches('}');
    while let Some((name, value)) = rest.split_once("=\"") {
        if name != "le" {
            names.push(name);
        }
        let mut escaped = false;
        let end = value.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        rest = end.and_then(|end| value.get(end + 1..)).unwrap_or("").trim_start_matches(',');
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_declaration_that_breaks_a_convention_is_named() {
        let bad = [
            Metric::counter("gannet_test_events", "Events seen", &[]),
            Metric::gauge("gannet_test_pods_age_seconds", "Events seen", &[]),
            Metric::gauge("gannet_test_Pods", "pods.", &["Pod"]),
        ];
        let problems = problems(&bad).join("\n");
        for words in [
            "gannet_test_events: counters, and only counters",
            "gannet_test_pods_age_seconds: another metric has the same help text",
            "gannet_test_pods_age_seconds: use base units",
            "gannet_test_Pods: the help is one sentence",
            "gannet_test_Pods: names and labels are snake_case",
        ] {
            assert!(problems.contains(words), "{words}\n{problems}");
        }
    }

    #[test]
    fn a_scrape_that_differs_from_the_declaration_is_named() {
        let declared = [Metric::counter("gannet_test_lost_total", "Samples lost", &["reason"])];
        let text = "# HELP gannet_test_lost Lost.\n# TYPE gannet_test_lost gauge\n\
                    gannet_test_lost_total{why=\"a\\\",b=\\\"\",node=\"n 1\"} 3\ngannet_test_new 1\n# EOF\n";
        let expected = [
            "gannet_test_lost: `Samples lost.` is declared, the scrape shows `Lost.`",
            "gannet_test_lost: `counter` is declared, the scrape shows `gauge`",
            "gannet_test_lost_total: `reason` is declared, the scrape shows `why,node`",
            "gannet_test_new is not declared",
        ];
        assert_eq!(undeclared(text, &[&declared]), expected);
    }
}
