//! The documents that show rules, held against the program that reads them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use gannetctl::{Console, parse, run};
use serde_json::Value;

fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns the YAML code blocks of a document that are rule files.
fn rule_files(document: &str) -> Vec<String> {
    document
        .split("```")
        .skip(1)
        .step_by(2)
        .filter_map(|block| block.strip_prefix("yaml\n"))
        .filter(|block| block.starts_with("rules:"))
        .map(ToOwned::to_owned)
        .collect()
}

/// Runs `gannetctl rules validate` on a file and returns the exit code and all output.
async fn validate(file: &Path) -> (u8, String) {
    let args = ["gannetctl", "rules", "validate", "-f", file.to_str().unwrap()];
    let cli = parse(args.map(Into::into)).unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = run(cli, &mut Console { out: &mut out, err: &mut err, terminal: false }).await;
    (code, String::from_utf8_lossy(&[out, err].concat()).into_owned())
}

/// Checks that each rule file that a document shows passes `gannetctl rules validate`.
#[tokio::test]
async fn every_rule_in_the_documents_is_valid() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rules.yaml");
    for (document, expected) in [("docs/rules.md", 15), ("README.md", 1)] {
        let examples = rule_files(&fs::read_to_string(tree().join(document)).unwrap());
        assert!(examples.len() >= expected, "{document} has only {} examples", examples.len());
        for example in examples {
            fs::write(&file, &example).unwrap();
            let (code, output) = validate(&file).await;
            assert_eq!(code, 0, "{document}: {output}\n{example}");
        }
    }
}

/// Checks that each file in `examples/rules` passes `gannetctl rules validate`.
#[tokio::test]
async fn every_example_rule_file_is_valid() {
    let mut count = 0;
    for entry in fs::read_dir(tree().join("examples/rules")).unwrap() {
        let (code, output) = validate(&entry.unwrap().path()).await;
        assert_eq!(code, 0, "{output}");
        count += 1;
    }
    assert!(count >= 5, "only {count} files");
}

fn collect_fields(schema: &Value, fields: &mut BTreeSet<String>) {
    match schema {
        Value::Object(object) => {
            if let Some(Value::Object(properties)) = object.get("properties") {
                fields.extend(properties.keys().cloned());
            }
            object.values().for_each(|value| collect_fields(value, fields));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_fields(item, fields)),
        _ => {}
    }
}

/// Checks that `docs/rules.md` names each field of the rule language. The schema of the custom resource is the list.
#[test]
fn the_rule_page_describes_every_field() {
    let page = fs::read_to_string(tree().join("docs/rules.md")).unwrap();
    let mut fields = BTreeSet::new();
    collect_fields(&gannet_proto::rules::json_schema().unwrap(), &mut fields);
    assert!(fields.len() > 40, "the schema has only {fields:?}");
    let missing: Vec<_> = fields
        .iter()
        .filter(|field| !page.contains(&format!("`{field}`")) && !page.contains(&format!("### {field}\n")))
        .collect();
    assert!(missing.is_empty(), "docs/rules.md does not describe {missing:?}");
}
