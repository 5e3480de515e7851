//! `flame`: an interactive flame graph on a terminal, an indented tree or JSON elsewhere.

mod model;
mod view;

use std::{fmt::Write as _, fs, time::Duration};

use gannet_proto::{
    pprof::{self, FlameTree, Side},
    query::{FlameNode, ReadReport},
};
use model::Model;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use serde_json::json;

use crate::{
    args::{Flame, Format},
    client::{Collector, MAX_PROFILE_BYTES},
    error::Error,
    render::{Console, amount, clean, percent, read_text, read_value},
};

/// A call tree with the sample type of its values.
pub(crate) struct Graph {
    root: FlameNode,
    sample_type: String,
    unit: String,
    /// True if the nodes also hold the values of a base.
    compared: bool,
    /// Reports of what the collector read for each side. Empty for a file.
    read: Vec<ReadReport>,
}

impl Graph {
    fn new(main: &[u8], base: Option<&[u8]>, args: &Flame) -> Result<Self, Error> {
        let mut tree = FlameTree::new()
            .with_interpreter_frames(args.interpreter_frames)
            .hide_error_frames(args.hide_error_frames);
        let mut add = |bytes: &[u8], side, wanted: &str| -> Result<String, Error> {
            let profile = pprof::decode(bytes, MAX_PROFILE_BYTES)?;
            let types = pprof::check(&profile)?.sample_types;
            let index = pprof::sample_type_index(&profile, wanted).ok_or_else(|| {
                Error::Usage(format!(
                    "the profile has no sample type `{wanted}`; it has {}",
                    types.join(", ")
                ))
            })?;
            tree.add(&profile, index, side)?;
            Ok(types[index].clone())
        };
        let sample_type = add(main, Side::Main, &args.sample_type)?;
        if let Some(base) = base {
            add(base, Side::Base, &sample_type)?;
        }
        Ok(Self {
            root: tree.prune(args.max_nodes),
            unit: sample_type.rsplit('/').next().unwrap_or_default().to_owned(),
            sample_type,
            compared: base.is_some(),
            read: Vec::new(),
        })
    }
}

/// Shows profiles that a collector stores.
pub(crate) async fn show(
    args: &Flame,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let (main, read) = collector.merge(args.select.selection(), &args.sample_type, console).await?;
    let (base, base_read) = if args.base.is_given() {
        collector
            .merge(args.base.selection(&args.select), &args.sample_type, console)
            .await
            .map(|(base, read)| (Some(base), Some(read)))?
    } else {
        (None, None)
    };
    let graph = Graph::new(&main, base.as_deref(), args)?;
    let read = std::iter::once(read).chain(base_read).collect();
    present(Graph { read, ..graph }, args, format, console)
}

/// Shows the pprof file of `--input`.
pub(crate) fn show_file(args: &Flame, format: Format, console: &mut Console<'_>) -> Result<(), Error> {
    let Some(file) = &args.input else { return Ok(()) };
    let bytes = fs::read(file).map_err(|source| Error::File { file: file.display().to_string(), source })?;
    present(Graph::new(&bytes, None, args)?, args, format, console)
}

fn present(graph: Graph, args: &Flame, format: Format, console: &mut Console<'_>) -> Result<(), Error> {
    if format == Format::Table && console.terminal && !args.tree {
        return explore(graph);
    }
    let text = match format {
        Format::Table => tree(&graph, args.min_percent),
        Format::Json | Format::Yaml => graph_json(&graph),
    };
    console.out.write_all(text.as_bytes())?;
    Ok(console.out.flush()?)
}

/// Formats a tree as in the HTTP API. A `serde_json::Value` would overflow the stack: it is dropped by recursion, and a
/// call stack may be thousands of frames deep.
fn node_json(root: &FlameNode) -> String {
    enum Step<'a> {
        Open(&'a FlameNode),
        Comma,
        Close,
    }
    let (mut steps, mut text) = (vec![Step::Open(root)], String::new());
    while let Some(step) = steps.pop() {
        match step {
            Step::Open(node) => {
                let FlameNode {
                    name,
                    file,
                    total,
                    self_,
                    base_total,
                    base_self,
                    children,
                    kernel,
                    inlined,
                    parent: _,
                    guessed,
                    base_guessed,
                } = node;
                let (name, file) = (json!(name), json!(file));
                let _ = write!(
                    text,
                    r#"{{"name":{name},"file":{file},"total":{total},"self":{self_},"base_total":{base_total},"#
                );
                let _ = write!(
                    text,
                    r#""base_self":{base_self},"guessed":{guessed},"base_guessed":{base_guessed},"kernel":{kernel},"#
                );
                let _ = write!(text, r#""inlined":{inlined},"children":["#);
                steps.push(Step::Close);
                for (number, child) in children.iter().enumerate().rev() {
                    steps.push(Step::Open(child));
                    if number > 0 {
                        steps.push(Step::Comma);
                    }
                }
            }
            Step::Comma => text.push(','),
            Step::Close => text.push_str("]}"),
        }
    }
    text
}

/// Formats the graph as one JSON object, which is valid YAML too.
fn graph_json(graph: &Graph) -> String {
    let Graph { root, sample_type, unit, compared: _, read } = graph;
    let sides = ["read", "base_read"].iter().zip(read);
    let mut reads = String::new();
    for (name, read) in sides {
        let _ = write!(reads, r#""{name}":{},"#, read_value(read));
    }
    format!(
        r#"{{"unit":{},"sample_type":{},"total":{},"base_total":{},{reads}"root":{}}}{}"#,
        json!(unit),
        json!(sample_type),
        root.total,
        root.base_total,
        node_json(root),
        "\n"
    )
}

/// Width of the bar that shows a share.
const BAR_CHARS: usize = 10;

/// Formats the tree as text, without functions below `min_percent` of the total.
fn tree(graph: &Graph, min_percent: f64) -> String {
    let Graph { root, sample_type, unit, compared, read } = graph;
    let whole = root.total.saturating_add(root.base_total);
    if whole == 0 {
        return format!("{sample_type}: no samples\n");
    }
    let mut text = format!("{sample_type}: {} in total", amount(root.total.into(), unit));
    if *compared {
        let _ = write!(text, ", compared with {}", amount(root.base_total.into(), unit));
    }
    text.push('\n');
    for (side, read) in ["", "base: "].iter().zip(read) {
        let _ = writeln!(text, "{side}{}", read_text(read));
    }
    let min_share = min_percent.max(0.0) / 100.0;
    let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
    let large = |node: &FlameNode| {
        share(node.total, root.total) >= min_share || share(node.base_total, root.base_total) >= min_share
    };
    // An only child keeps the indent of its parent: deep stacks would run out of the terminal.
    let mut open: Vec<(&FlameNode, String, &str)> = vec![(root, String::new(), "")];
    while let Some((node, indent, branch)) = open.pop() {
        let part = share(node.total, root.total);
        let filled = ((part * BAR_CHARS as f64).round() as usize).min(BAR_CHARS);
        let _ = write!(
            text,
            "{}{} {:>7} {:>9} ",
            "█".repeat(filled),
            "░".repeat(BAR_CHARS - filled),
            percent(node.total, root.total),
            amount(node.total.into(), unit)
        );
        if *compared {
            let change = (part - share(node.base_total, root.base_total)) * 100.0;
            let _ = write!(text, "{change:>+8.2} ");
        }
        let _ = writeln!(text, "{indent}{branch}{}{}", clean(&node.name), notes(node));
        let below = match branch {
            "" => indent,
            "├ " => format!("{indent}│ "),
            _ => format!("{indent}  "),
        };
        let shown: Vec<_> = node.children.iter().filter(|child| large(child)).collect();
        let branch = |last| match (shown.len(), last) {
            (1, _) => "",
            (_, true) => "└ ",
            (_, false) => "├ ",
        };
        open.extend(
            shown
                .iter()
                .enumerate()
                .rev()
                .map(|(i, child)| (*child, below.clone(), branch(i + 1 == shown.len()))),
        );
    }
    text
}

/// Returns how much of a frame's value comes from stacks in which it rests on a guess: `guessed`, or `12% guessed`.
pub(crate) fn guess(guessed: u64, all: u64) -> Option<String> {
    match guessed {
        0 => None,
        some if some >= all => Some("guessed".to_owned()),
        some => Some(format!("{} guessed", percent(some, all))),
    }
}

fn notes(node: &FlameNode) -> String {
    let mut notes = String::new();
    if !node.file.is_empty() && !node.name.starts_with(&node.file) {
        let _ = write!(notes, "  {}", clean(&node.file));
    }
    if node.inlined {
        notes.push_str("  (inlined)");
    }
    let all = node.total.saturating_add(node.base_total);
    if let Some(guessed) = guess(node.guessed.saturating_add(node.base_guessed), all) {
        let _ = write!(notes, "  ({guessed})");
    }
    notes
}

/// Runs the interactive graph until the user quits.
fn explore(graph: Graph) -> Result<(), Error> {
    let mut model = Model::new(graph);
    // Also installs a panic hook that restores the terminal.
    let mut terminal = ratatui::try_init()?;
    let result = (|| {
        loop {
            terminal.draw(|frame| view::draw(frame, &mut model))?;
            // A key or a new terminal size ends the wait.
            if !event::poll(Duration::from_secs(3600))? {
                continue;
            }
            if let Event::Key(key) = event::read()?
                && key.kind != KeyEventKind::Release
            {
                let interrupted =
                    key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
                if interrupted || !model.key(key.code) {
                    return Ok(());
                }
            }
        }
    })();
    ratatui::restore();
    result
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn node(name: &str, own: u64, base: u64, children: Vec<FlameNode>) -> FlameNode {
        FlameNode {
            name: name.to_owned(),
            file: if name == "all" { String::new() } else { "app".to_owned() },
            total: own + children.iter().map(|child| child.total).sum::<u64>(),
            self_: own,
            base_total: base + children.iter().map(|child| child.base_total).sum::<u64>(),
            base_self: base,
            children,
            kernel: name.starts_with("sys_"),
            inlined: false,
            parent: 0,
            guessed: 0,
            base_guessed: 0,
        }
    }

    pub(crate) fn graph(compared: bool) -> Graph {
        let base = u64::from(compared);
        let work = node(
            "work",
            20,
            30 * base,
            vec![node("memcpy", 40, 0, vec![]), node("hash", 10, 10 * base, vec![])],
        );
        let serve = node("serve", 0, 0, vec![work, node("sys_read", 20, 60 * base, vec![])]);
        let root = node("all", 0, 0, vec![serve, node("idle_loop", 10, 0, vec![])]);
        Graph {
            root,
            sample_type: "samples/count".to_owned(),
            unit: "count".to_owned(),
            compared,
            read: Vec::new(),
        }
    }

    #[test]
    fn the_tree_shows_shares_and_omits_small_functions() {
        insta::assert_snapshot!(tree(&graph(false), 15.0), @r"
        samples/count: 100 in total
        ██████████ 100.00%       100 all
        █████████░  90.00%        90 serve  app
        ███████░░░  70.00%        70 ├ work  app
        ████░░░░░░  40.00%        40 │ memcpy  app
        ██░░░░░░░░  20.00%        20 └ sys_read  app
        ");
    }

    #[test]
    fn a_compared_tree_shows_the_change_of_each_share() {
        let text = tree(&graph(true), 15.0);
        let line = |name: &str| text.lines().find(|line| line.contains(name)).unwrap().to_owned();
        assert!(line("memcpy").contains("+40.00"), "{text}");
        assert!(line("sys_read").contains("-40.00"), "{text}");
    }

    #[test]
    fn the_json_holds_the_tree() {
        let value: serde_json::Value = serde_json::from_str(&graph_json(&graph(true))).unwrap();
        let serve = &value["root"]["children"][0];
        assert_eq!((serve["name"].as_str(), serve["total"].as_u64()), (Some("serve"), Some(90)));
        assert_eq!(
            (serve["children"][1]["kernel"].as_bool(), value["base_total"].as_u64()),
            (Some(true), Some(100))
        );
    }

    /// Checks all, a part and none of a frame's value.
    #[test]
    fn guessed_frames_are_marked_in_each_form() {
        let mut graph = graph(false);
        (graph.root.guessed, graph.root.children[0].guessed) = (10, 10);
        let work = &mut graph.root.children[0].children[0];
        (work.guessed, work.children[1].guessed) = (10, 10);
        let text = tree(&graph, 0.0);
        let line = |name: &str| text.lines().find(|line| line.contains(name)).unwrap().to_owned();
        assert!(line("hash").ends_with("hash  app  (guessed)"), "{text}");
        assert!(line("work").ends_with("work  app  (14.29% guessed)"), "{text}");
        assert!(line(" all").ends_with("all  (10.00% guessed)"), "{text}");
        assert!(!line("memcpy").contains("guessed"), "{text}");
        let value: serde_json::Value = serde_json::from_str(&graph_json(&graph)).unwrap();
        let work = &value["root"]["children"][0]["children"][0];
        assert_eq!((work["guessed"].as_u64(), work["base_guessed"].as_u64()), (Some(10), Some(0)));
    }

    #[test]
    fn a_tree_of_thousands_of_levels_does_not_overflow() {
        let mut root = node("leaf", 1, 0, vec![]);
        for _ in 0..3000 {
            root = node("f", 0, 0, vec![root]);
        }
        let graph = Graph { root, ..graph(false) };
        assert_eq!(tree(&graph, 0.0).lines().count(), 3002);
        assert_eq!(graph_json(&graph).matches(r#""name":"f""#).count(), 3000);
        Model::new(graph);
    }
}
