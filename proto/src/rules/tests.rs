use proptest::{collection, option, prelude::*};
use rstest::rstest;

use super::*;
use crate::control::{self, Capture, Condition, Lifetime, Match, condition};

/// A rule with every field of the format.
const EVERYTHING: &str = r#"
rules:
  - id: checkout-cpu-pressure
    description: why this exists
    match:
      comm: ["python3*", "node"]
      exe: ["/usr/bin/postgres"]
      cgroup: ["/kubepods.slice/kubepods-burstable.slice/*"]
      namespaces: [shop]
      pod_labels: {app: checkout}
      containers: [app]
      workloads: ["deployment/checkout"]
      pids: []
      uid: [1000]
      runtime: [python]
      runtime_version: ["3.11", "3.12.1"]
      service: ["shop*"]
    nodes:
      selector: "pool=gpu"
      names: []
      percent: 100
    when:
      - pressure: {resource: cpu, kind: some, stall_us: 150000, window_us: 1000000, scope: container}
      - cpu_usage: {above_millicores: 1500, for: 10s}
      - throttled: {above_percent: 20, for: 10s}
      - exec: {}
      - schedule: {every: 10m, for: 30s}
    capture:
      kind: [on_cpu, off_cpu]
      hz: 99
      duration: 30s
      cooldown: 2m
      lead_up: 10s
      max_concurrent: 3
      stacks: {user: true, kernel: true}
    lifetime: {ttl: 1h30m, not_before: null}
    labels: {team: shop}
    priority: 0
"#;

#[track_caller]
fn good(text: &str) -> Vec<Rule> {
    let rules = parse(text, "rules.yaml").unwrap_or_else(|errors| panic!("{errors:#?}"));
    assert_eq!(validate(&rules, &Caps::default()), []);
    rules
}

#[track_caller]
fn bad(text: &str) -> Vec<String> {
    parse(text, "rules.yaml").unwrap_err().iter().map(ToString::to_string).collect()
}

/// Returns the errors of a rule with this body, as `field: reason`.
#[track_caller]
fn faults(body: &str) -> Vec<String> {
    let text = format!("rules: [{{id: r, match: {{comm: [\"*\"]}}, {body}}}]");
    let rules = parse(&text, "t").unwrap_or_else(|errors| panic!("{errors:#?}"));
    validate(&rules, &Caps::default())
        .into_iter()
        .map(|RuleError { rule_id, field, reason }| {
            assert_eq!(rule_id, "r");
            format!("{field}: {reason}")
        })
        .collect()
}
use crate::control::RuleError;

#[test]
fn every_field_of_the_format_is_read_and_written() {
    let rules = good(EVERYTHING);
    let rule = &rules[0];
    assert_eq!(rule.r#match.as_ref().unwrap().pod_labels, "app=checkout");
    assert_eq!(rule.when.len(), 5);
    assert_eq!(rule.lifetime.unwrap().ttl.unwrap().seconds, 5400);
    assert_eq!((effective_hz(rule), effective_kinds(rule).len()), (99, 2));
    let yaml = to_yaml(&rules);
    assert!(yaml.contains("ttl: 1h30m"), "{yaml}");
    assert_eq!(good(&yaml), rules);
    let json = serde_json::json!({ "rules": [to_json(rule)] }).to_string();
    assert_eq!(good(&json), rules, "JSON is accepted too");
}

#[test]
fn several_documents_are_one_set() {
    let rules = good("rules:\n- {id: b, match: {comm: [b]}}\n---\nrules:\n- {id: a, match: {comm: [a]}}\n");
    assert_eq!(rules.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    assert_eq!(good(""), []);
    assert_eq!(good("rules: []"), []);
    assert_eq!(good("rules:"), []);
}

#[rstest]
#[case::unknown_field(
    "rules:\n- id: a\n  match:\n    com: [x]\n",
    "rules.yaml:4:5: rule `a`: match.com: unknown field `com`, expected one of `comm`"
)]
#[case::unknown_top("rule: []", "rules.yaml:1:1: rule: unknown field: a rule file is `rules:`")]
#[case::unknown_condition(
    "rules:\n- id: a\n  when:\n  - presure: {}\n",
    "rules.yaml:4:5: rule `a`: when[0]: unknown variant `presure`, expected one of `pressure`"
)]
#[case::zero_hz(
    "rules:\n- id: a\n  capture:\n    hz: 0\n",
    "rules.yaml:4:5: rule `a`: capture.hz: 0 is not allowed"
)]
#[case::no_id("rules:\n- match: {comm: [a]}\n", "rules.yaml:2:3: rule rules[0]: missing field `id`")]
#[case::number_for_text(
    "rules:\n- id: a\n  match: {comm: [7]}\n",
    "rules.yaml:3:18: rule `a`: match.comm[0]: invalid type: integer `7`, expected a string: put the value in quotes"
)]
#[case::number_for_version(
    "rules:\n- id: a\n  match: {runtime_version: [3.10]}\n",
    "rules.yaml:3:29: rule `a`: match.runtime_version[0]: invalid type: floating point `3.1`, expected a string: put the \
     value in quotes"
)]
#[case::bare_number(
    "rules:\n- id: a\n  lifetime: {ttl: 20}\n",
    "rules.yaml:3:14: rule `a`: lifetime.ttl: invalid type: integer `20`, expected a duration with its unit, like 30s"
)]
#[case::bad_duration(
    "rules:\n- id: a\n  lifetime: {ttl: soon}\n",
    "rules.yaml:3:14: rule `a`: lifetime.ttl: `soon` is not a duration: write it like 30s, 2m or 1h30m"
)]
#[case::bad_selector(
    "rules:\n- id: a\n  match: {pod_labels: 'app in a'}\n",
    "rules.yaml:3:11: rule `a`: match.pod_labels: expected `(` at character 8, found `a`"
)]
#[case::bad_time(
    "rules:\n- id: a\n  lifetime: {not_before: tomorrow}\n",
    "rules.yaml:3:14: rule `a`: lifetime.not_before: `tomorrow` is not a time"
)]
#[case::list("- id: a\n", "rules.yaml:1:1: a rule file is `rules:` followed by a list of rules")]
#[case::scalar("rules: 7", "rules.yaml:1:8: rules: a rule file is `rules:` followed by a list of rules")]
#[case::not_yaml("rules: [", "rules.yaml:1:")]
#[case::twice("rules:\n- id: a\n  id: b\n", "rules.yaml:3:")]
fn a_mistake_is_named_with_its_line_and_field(#[case] text: &str, #[case] error: &str) {
    let errors = bad(text);
    assert!(errors[0].starts_with(error), "{errors:#?}");
}

#[test]
fn mistakes_in_several_rules_are_reported_together() {
    let errors = bad("rules:\n- {id: a, x: 1}\n- {id: b}\n- {id: c, priority: high}\n---\nother: 1\n");
    assert_eq!(errors.len(), 4, "{errors:#?}");
}

#[rstest]
#[case::comm_length(
    "match: {comm: [abcdefghijklmnop]}",
    "match.comm[0]: `abcdefghijklmnop` has 16 bytes, and the kernel stores 15 of a command name: write \
     `abcdefghijklmno*`, or use match.exe"
)]
#[case::comm_path("match: {comm: [/usr/bin/x]}", "match.comm[0]: `/usr/bin/x` is a path")]
#[case::comm_star("match: {comm: [a*b]}", "match.comm[0]: `a*b` may have `*` only at the end")]
#[case::comm_empty("match: {comm: ['']}", "match.comm[0]: `` is empty")]
#[case::comm_nul("match: {comm: [\"a\\0b\"]}", "match.comm[0]: `a\\0b` has a NUL")]
#[case::exe("match: {exe: [usr/bin/x]}", "match.exe[0]: `usr/bin/x` is not an absolute path")]
#[case::cgroup("match: {cgroup: [kubepods*]}", "match.cgroup[0]: `kubepods*` is not an absolute path")]
#[case::namespace("match: {namespaces: [Shop]}", "match.namespaces[0]: `Shop` is not a name of 1 to 63")]
#[case::workload("match: {workloads: [checkout]}", "match.workloads[0]: `checkout` is not a workload")]
#[case::pid("match: {pids: [1, 0]}", "match.pids[1]: 0 is not a process")]
#[case::runtime(
    "match: {runtime: [pyhton]}",
    "match.runtime[0]: `pyhton` is not a runtime that Gannet knows: give one of dotnet, erlang, go, java, luajit, node, perl, php, python, ruby"
)]
#[case::version(
    "match: {runtime: [python], runtime_version: ['3.11*']}",
    "match.runtime_version[0]: `3.11*` is not a version: give one to 3 numbers with `.` between them"
)]
#[case::version_number(
    "match: {runtime: [python], runtime_version: ['3.011']}",
    "match.runtime_version[0]: `3.011` is not a version"
)]
#[case::version_alone("match: {runtime_version: ['3.11']}", "match.runtime_version: needs match.runtime")]
#[case::service("match: {service: [shop, 'a*b']}", "match.service[1]: `a*b` may have `*` only at the end")]
#[case::services("match: {service: ['*']}", "match.service[0]: matches every service: give a name")]
#[case::nothing("match: {}", "match: is empty: choose processes, or give `comm: [\"*\"]`")]
#[case::percent("nodes: {percent: 101}", "nodes.percent: is 101: give 1 to 100")]
#[case::hz(
    "capture: {hz: 5000}, lifetime: {ttl: 1m}",
    "capture.hz: is 5000, and the limit (max_hz) is 1000: give 1 to 1000"
)]
#[case::ttl(
    "capture: {hz: 199}",
    "lifetime.ttl: is missing: a rule above 99 Hz (this one: 199) must have an end"
)]
#[case::ttl_zero("lifetime: {ttl: 0s}", "lifetime.ttl: is 0s: give 1s to 366d")]
#[case::duration("when: [{exec: {}}], capture: {duration: 2h}", "capture.duration: is 2h: give 1s to 1h")]
#[case::duration_always("capture: {duration: 30s}", "capture.duration: has no effect without `when`")]
#[case::concurrent("capture: {max_concurrent: 65}", "capture.max_concurrent: is 65, and the limit is 64")]
#[case::stacks("capture: {stacks: {user: false, kernel: false}}", "capture.stacks: leaves nothing to record")]
#[case::kinds("capture: {kind: [on_cpu, on_cpu]}", "capture.kind[1]: is a duplicate")]
#[case::label_reserved("labels: {pod: x}", "labels.pod: is a label that Gannet sets itself")]
#[case::label_name("labels: {a-b: x}", "labels.a-b: label name `a-b` is not allowed")]
#[case::priority("priority: 5000", "priority: is 5000: give -1000 to 1000")]
#[case::stall(
    "when: [{pressure: {resource: cpu, kind: some, stall_us: 1000000, window_us: 1000000}}]",
    "when[0].pressure.stall_us: is 1000000: give at least 1, and less than the window (1000000)"
)]
#[case::window(
    "when: [{pressure: {resource: io, kind: full, stall_us: 1, window_us: 499999}}]",
    "when[0].pressure.window_us: is 499999: give 500000 to 10000000"
)]
#[case::pressure_kind(
    "when: [{pressure: {resource: io, stall_us: 1, window_us: 500000}}]",
    "when[0].pressure.kind: is missing: give some"
)]
#[case::node_cpu_full(
    "when: [{pressure: {resource: cpu, kind: full, scope: node, stall_us: 1, window_us: 500000}}]",
    "when[0].pressure.kind: is never met"
)]
#[case::usage(
    "when: [{cpu_usage: {above_millicores: 1}}]",
    "when[0].cpu_usage.for: is missing: give 1s to 1h"
)]
#[case::throttled(
    "when: [{throttled: {above_percent: 100, for: 1s}}]",
    "when[0].throttled.above_percent: is 100"
)]
#[case::schedule(
    "when: [{schedule: {every: 30s, for: 30s}}]",
    "when[0].schedule.for: is 30s, and the next capture"
)]
fn a_wrong_value_is_named_with_its_remedy(#[case] body: &str, #[case] error: &str) {
    // Two fields `match` are an error, so this one replaces the default.
    let found = if body.starts_with("match") {
        let rules = parse(&format!("rules: [{{id: r, {body}}}]"), "t").unwrap();
        validate(&rules, &Caps::default()).into_iter().map(|e| format!("{}: {}", e.field, e.reason)).collect()
    } else {
        faults(body)
    };
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(found[0].starts_with(error), "{}", found[0]);
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let text = "rules: [{id: A_, match: {comm: ['a*b', '']}, capture: {hz: 1001}}, {id: x}, {id: x}]";
    let found: Vec<_> = validate(&parse(text, "t").unwrap(), &Caps::default())
        .into_iter()
        .map(|error| (error.rule_id, error.field))
        .collect();
    let expected = [
        ("A_", "id"),
        ("A_", "match.comm[0]"),
        ("A_", "match.comm[1]"),
        ("A_", "capture.hz"),
        ("A_", "lifetime.ttl"),
        ("x", "match"),
        ("x", "id"),
        ("x", "match"),
    ];
    assert_eq!(found, expected.map(|(id, field)| (id.to_owned(), field.to_owned())));
}

#[test]
fn a_lower_limit_refuses_valid_rules_and_large_sets() {
    let rules = good("rules: [{id: a, match: {comm: [a]}, capture: {hz: 99}}, {id: b, match: {comm: [b]}}]");
    let fields = |caps: Caps| validate(&rules, &caps).into_iter().map(|e| e.field).collect::<Vec<_>>();
    assert_eq!(fields(Caps { max_hz: 50, ..Caps::default() }), ["capture.hz"]);
    assert_eq!(fields(Caps { ttl_above_hz: 50, ..Caps::default() }), ["lifetime.ttl"]);
    assert_eq!(fields(Caps { ttl_always_above_hz: 50, ..Caps::default() }), ["lifetime.ttl"]);
    assert_eq!(fields(Caps { max_rules: 1, ..Caps::default() }), ["rules"]);
    assert_eq!(fields(Caps { max_bytes: 10, ..Caps::default() }), ["rules"]);
}

#[test]
fn omitted_fields_have_the_documented_defaults() {
    let rules = good("rules: [{id: a, match: {comm: [a]}}, {id: b, match: {comm: [b]}, when: [{exec: {}}]}]");
    assert_eq!((effective_hz(&rules[0]), effective_hz(&rules[1])), (19, 99));
    assert_eq!(effective_kinds(&rules[0]), [capture::Kind::OnCpu]);
}

#[test]
fn the_digest_depends_only_on_the_content_of_the_rules() {
    let rules = good("rules: [{id: b, match: {comm: [b]}}, {id: a, match: {comm: [a]}, capture: {}}]");
    let mut other = rules.clone();
    other.reverse();
    other[0].capture = Some(Capture::default());
    assert_eq!(digest(&rules), digest(&other));
    assert_eq!(digest(&rules).len(), 64);
    other[1].priority = 1;
    assert_ne!(digest(&rules), digest(&other));
    // A constant, because a node keeps its digest across an upgrade of either side.
    assert_eq!(digest(&[]), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

#[test]
fn nodes_are_selected_by_name_label_and_percentage() {
    let labels = BTreeMap::from([("pool".to_owned(), "gpu".to_owned())]);
    let rule = |nodes| Rule { nodes: Some(nodes), ..Rule::default() };
    let selects = |selector: &str| {
        let selector = selector.to_owned();
        is_for_node(&rule(NodeSelector { selector, ..NodeSelector::default() }), "n1", &labels)
    };
    assert!(is_for_node(&Rule::default(), "n1", &labels));
    assert!(selects("pool=gpu") && selects("pool") && !selects("pool=cpu") && !selects("zone"));
    assert!(!selects("pool in ("), "a broken selector selects no node");
    let named = rule(NodeSelector { names: vec!["n2".into()], ..NodeSelector::default() });
    assert!(is_for_node(&named, "n2", &labels) && !is_for_node(&named, "n1", &labels));
    let share = |percent| {
        let rule = rule(NodeSelector { percent, ..NodeSelector::default() });
        (0..1000).filter(|n| is_for_node(&rule, &format!("node-{n}"), &labels)).collect::<Vec<_>>()
    };
    assert_eq!((share(0).len(), share(100).len()), (1000, 1000));
    let (ten, thirty) = (share(10), share(30));
    assert!(
        (60..140).contains(&ten.len()) && (250..350).contains(&thirty.len()),
        "{} {}",
        ten.len(),
        thirty.len()
    );
    assert!(ten.iter().all(|n| thirty.contains(n)), "a larger percentage keeps the nodes of a smaller one");
}

#[rstest]
#[case("python3", "python3", true)]
#[case("python3", "python3.11", false)]
#[case("python3*", "python3", true)]
#[case("python3*", "python3.11", true)]
#[case("python3*", "python", false)]
#[case("*", "", true)]
fn patterns_match_exactly_or_by_prefix(#[case] pattern: &str, #[case] name: &str, #[case] matched: bool) {
    let pattern = Pattern::parse(pattern).unwrap();
    assert_eq!(pattern.matches(name.as_bytes()), matched);
    assert_eq!(pattern.to_string().parse(), Ok(pattern));
}

#[test]
fn a_version_stands_for_all_releases_that_begin_with_it() {
    for (wanted, version, is_match) in [
        ("3", "3.11.2", true),
        ("3.11", "3.11.2", true),
        ("3.11.2", "3.11.2", true),
        ("3.11", "3.11", true),
        ("3.1", "3.11.2", false),
        ("3.11.2", "3.11", false),
        ("3.11.2", "3.11.20", false),
        ("3.12", "3.11.2", false),
        ("3", "", false),
    ] {
        assert_eq!(is_version(wanted, version), is_match, "{wanted} {version}");
    }
}

fn seconds(range: std::ops::Range<i64>) -> impl Strategy<Value = Option<prost_types::Duration>> {
    option::of(
        (range, 0..2_i32)
            .prop_map(|(seconds, half)| prost_types::Duration { seconds, nanos: half * 500_000_000 }),
    )
}

prop_compose! {
    fn some_match()(
        comm in collection::vec("[a-z: #'\"-]{1,14}\\*?", 1..4), // with special characters of YAML
        exe in collection::vec("/[a-z/]{0,30}\\*?", 0..3),
        namespaces in collection::vec("[a-z][a-z0-9]{0,9}", 0..3),
        pod_labels in prop_oneof![Just(String::new()), Just("app=a,tier in (b,c),!x".to_owned())],
        pids in collection::vec(1_u32..100_000, 0..3),
        runtime_version in collection::vec("3\\.[1-9][0-9]?", 0..3),
        service in collection::vec("[a-z]{1,9}\\*?", 0..3),
    ) -> Match {
        let runtime = vec!["python".to_owned()];
        Match { comm, exe, namespaces, pod_labels, pids, runtime, runtime_version, service, ..Match::default() }
    }
}

prop_compose! {
    fn some_rule()(
        id in "[a-z][a-z0-9]{0,20}",
        description in "[ -~äöü\\n]{0,60}",
        r#match in some_match(),
        triggered in any::<bool>(),
        hz in 0_u32..99,
        duration in seconds(1..3599),
        ttl in seconds(1..100_000),
        not_before in option::of(0_i64..4_000_000_000),
        kernel_stacks in option::of(Just(false)),
        only_in_span in any::<bool>(),
        labels in collection::btree_map("[a-z]{1,3}x", "\\PC{0,30}", 0..3),
        priority in -1000..=1000_i32,
    ) -> Rule {
        let exec = Condition { kind: Some(condition::Kind::Exec(condition::Exec {})) };
        let not_before = not_before.map(|seconds| prost_types::Timestamp { seconds, nanos: 0 });
        Rule {
            id,
            description,
            r#match: Some(r#match),
            when: if triggered { vec![exec] } else { Vec::new() },
            capture: Some(Capture {
                hz,
                duration: duration.filter(|_| triggered),
                kernel_stacks,
                only_in_span,
                ..Capture::default()
            }),
            lifetime: Some(Lifetime { ttl, not_before }),
            labels,
            priority,
            nodes: None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_rule_reads_back_from_its_yaml(rule in some_rule()) {
        let rules = canonical(vec![rule]);
        prop_assert_eq!(validate(&rules, &Caps::default()), Vec::<control::RuleError>::new());
        let yaml = to_yaml(&rules);
        let read = parse(&yaml, "t").map_err(|errors| TestCaseError::fail(format!("{errors:?}\n{yaml}")))?;
        prop_assert_eq!(&read, &rules);
        prop_assert_eq!(digest(&read), digest(&rules));
    }

    #[test]
    fn a_written_rule_fits_the_schema(rule in some_rule()) {
        let found = misfits(&to_json(&canonical(vec![rule])[0]), &json_schema().unwrap(), "rule");
        prop_assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn any_text_parses_without_a_panic(text in "\\PC{0,100}|(rules:|- |id: a|[\\[\\]{}&*!:,\n ]){0,20}") {
        let _ = parse(&text, "t");
    }

    #[test]
    fn any_pattern_matches_its_own_text(text in "\\PC{1,20}", more in "\\PC{0,5}") {
        if let Ok(pattern) = Pattern::parse(&text) {
            prop_assert!(pattern.matches(pattern.text().as_bytes()));
            let longer = format!("{}{more}", pattern.text());
            prop_assert_eq!(pattern.matches(longer.as_bytes()), pattern.is_prefix() || more.is_empty());
        }
    }
}

#[test]
fn a_file_that_is_or_expands_too_large_is_refused() {
    assert!(bad(&" ".repeat(MAX_FILE_BYTES + 1))[0].contains("at most"));
    let mut bomb = String::from("a0: &a0 [x]\n");
    for i in 1..40 {
        let nine = vec![format!("*a{}", i - 1); 9].join(",");
        writeln!(bomb, "a{i}: &a{i} [{nine}]").unwrap();
    }
    assert!(!bad(&bomb).is_empty());
}

/// Returns the paths of a value that do not fit its schema.
fn misfits(value: &serde_json::Value, schema: &serde_json::Value, path: &str) -> Vec<String> {
    use serde_json::Value;
    if schema["x-kubernetes-preserve-unknown-fields"] == true {
        return Vec::new();
    }
    let fits = match (schema["type"].as_str(), value) {
        (Some("object"), Value::Object(fields)) => {
            return fields
                .iter()
                .flat_map(|(name, value)| {
                    let known = schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
                    let path = format!("{path}.{name}");
                    known.map_or_else(|| vec![path.clone()], |schema| misfits(value, schema, &path))
                })
                .collect();
        }
        (Some("array"), Value::Array(items)) => {
            return items.iter().flat_map(|item| misfits(item, &schema["items"], path)).collect();
        }
        (Some("string"), Value::String(text)) => {
            schema["enum"].as_array().is_none_or(|names| names.iter().any(|name| name == text))
                && schema.get("pattern").is_none_or(|_| text.starts_with(|c: char| c.is_ascii_digit()))
        }
        (Some("integer"), Value::Number(_)) | (Some("boolean"), Value::Bool(_)) => true,
        _ => false,
    };
    if fits { Vec::new() } else { vec![format!("{path}: {value}")] }
}

#[test]
fn the_schema_describes_every_field_and_no_other() {
    let schema = json_schema().unwrap();
    let rule = to_json(&good(EVERYTHING)[0]);
    assert_eq!(misfits(&rule, &schema, "rule"), Vec::<String>::new());
    let wrong = serde_json::json!({ "id": "a", "match": { "com": ["x"] }, "capture": { "kind": ["both"] } });
    assert_eq!(misfits(&wrong, &schema, "rule"), ["rule.capture.kind: \"both\"", "rule.match.com"]);
    let capture = &schema["properties"]["capture"]["properties"];
    assert_eq!(capture["kind"]["items"]["enum"], serde_json::json!(["on_cpu", "off_cpu"]));
    assert!(capture["stacks"]["properties"]["user"].is_object());
    let when = &schema["properties"]["when"]["items"];
    assert_eq!((when["maxProperties"].as_u64(), when["properties"].as_object().unwrap().len()), (Some(1), 5));
    let comm = schema["properties"]["match"]["properties"]["comm"]["description"].as_str().unwrap();
    assert!(comm.starts_with("Command names of 1 to 15 bytes."), "{comm}");
}
