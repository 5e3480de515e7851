//! The generated pages `docs/configuration.md` and `docs/metrics.md`.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command};

use crate::metrics::Metric;

/// Returns the markdown of all commands and options of a program.
///
/// Only the program itself shows options that all its commands share. A command that reads a file (it has an option
/// `config`) also has a column with the keys of the file.
pub fn options(command: &Command) -> String {
    let mut command = command.clone();
    command.build();
    let mut page = String::new();
    section(&command, command.get_name(), true, &mut page);
    page
}

fn section(command: &Command, path: &str, is_root: bool, page: &mut String) {
    let about = command.get_long_about().or(command.get_about());
    let _ = writeln!(page, "## `{path}`\n");
    if let Some(about) = about {
        let _ = writeln!(page, "{}\n", about.to_string().trim());
    }
    let arguments: Vec<&Arg> = command.get_arguments().filter(|arg| is_shown(arg, is_root)).collect();
    if !arguments.is_empty() {
        let has_file = command.get_arguments().any(|arg| arg.get_id() == "config");
        let key = if has_file { " Key |" } else { "" };
        let rule = if has_file { " --- |" } else { "" };
        let _ = writeln!(page, "| Option | Variable |{key} Default | Description |");
        let _ = writeln!(page, "| --- | --- |{rule} --- | --- |");
        for arg in arguments {
            row(arg, has_file, page);
        }
        page.push('\n');
    }
    for child in command.get_subcommands().filter(|child| !child.is_hide_set() && child.get_name() != "help")
    {
        section(child, &format!("{path} {}", child.get_name()), false, page);
    }
}

/// Reports whether the table of a command shows an option. Only the root shows global options, which clap repeats in
/// each command below it.
fn is_shown(arg: &Arg, is_root: bool) -> bool {
    !arg.is_hide_set()
        && !matches!(arg.get_id().as_str(), "help" | "version")
        && (is_root || !arg.is_global_set())
}

fn row(arg: &Arg, has_file: bool, page: &mut String) {
    let names = arg.get_value_names().unwrap_or_default();
    let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    let values =
        names.iter().map(|name| if arg.is_positional() { format!("{name}") } else { format!(" {name}") });
    let values: String = if takes_value { values.collect() } else { String::new() };
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    let flags: Vec<String> = short.into_iter().chain(long).collect();
    let option = format!("`{}{values}`", flags.join(", "));
    let variable = arg.get_env().map(|name| format!("`{}`", name.to_string_lossy())).unwrap_or_default();
    let defaults = arg.get_default_values().iter().map(|value| format!("`{}`", value.to_string_lossy()));
    let mut default = match arg.get_action() {
        ArgAction::Set | ArgAction::Append if !arg.is_hide_default_value_set() => {
            defaults.collect::<Vec<_>>().join(", ")
        }
        _ => String::new(),
    };
    let mut help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    // A default that depends on the machine stands in the help.
    if let Some((text, rest)) = help.rsplit_once("[default: ")
        && let Some(value) = rest.trim_end().strip_suffix(']')
    {
        value.clone_into(&mut default);
        help = text.to_owned();
    }
    let mut help = cell(&help);
    if !help.is_empty() && !help.ends_with('.') {
        help.push('.');
    }
    let possible: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|value| takes_value && !value.is_hide_set())
        .map(|value| match value.get_help() {
            Some(help) => format!("`{}` ({help})", value.get_name()),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if !possible.is_empty() {
        let _ = write!(help, " One of {}.", cell(&possible.join(", ")));
    }
    let key = match arg.get_id().as_str() {
        _ if !has_file => String::new(),
        "config" | "print_config" => " |".to_owned(),
        id => format!(" `{id}` |"),
    };
    let _ = writeln!(page, "| {option} | {variable} |{key} {} | {help} |", cell(&default));
}

/// Returns the markdown table of metrics.
pub fn metrics(metrics: &[Metric]) -> String {
    let mut page =
        "| Metric | Type | Unit | Labels | Meaning |\n| --- | --- | --- | --- | --- |\n".to_owned();
    for metric in metrics {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let _ = writeln!(
            page,
            "| `{}` | {} | {} | {} | {} |",
            metric.name,
            metric.kind.as_str(),
            metric.unit(),
            labels.join(", "),
            cell(metric.help)
        );
    }
    page
}

/// Returns a text as the content of a table cell: one line, without column separators.
fn cell(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_each_option_with_variable_key_and_default() {
        let run = Command::new("run")
            .about("Samples this node")
            .arg(
                Arg::new("config")
                    .long("config")
                    .value_name("FILE")
                    .env("GANNET_AGENT_CONFIG")
                    .help("A YAML file"),
            )
            .arg(
                Arg::new("log_format")
                    .long("log-format")
                    .value_name("FORMAT")
                    .value_parser(["text", "json"])
                    .default_value("text")
                    .help("Form of a|b\nlog lines"),
            )
            .arg(Arg::new("insecure").short('k').long("insecure").action(ArgAction::SetTrue));
        let command = Command::new("gannet-agent")
            .subcommand(run)
            .subcommand(
                Command::new("show").arg(Arg::new("file").value_name("FILE").help("A file [default: none]")),
            )
            .subcommand(Command::new("secret").hide(true));
        let page = options(&command);
        let expected = "## `gannet-agent`\n\n## `gannet-agent run`\n\nSamples this node\n\n\
            | Option | Variable | Key | Default | Description |\n| --- | --- | --- | --- | --- |\n\
            | `--config FILE` | `GANNET_AGENT_CONFIG` | |  | A YAML file. |\n\
            | `--log-format FORMAT` |  | `log_format` | `text` | Form of a\\|b log lines. One of `text`, `json`. |\n\
            | `-k, --insecure` |  | `insecure` |  |  |\n\n\
            ## `gannet-agent show`\n\n| Option | Variable | Default | Description |\n| --- | --- | --- | --- |\n\
            | `FILE` |  | none | A file. |\n\n";
        assert_eq!(page, expected);
    }

    #[test]
    fn a_page_shows_each_metric_with_unit_and_labels() {
        let declared = [Metric::gauge("gannet_test_spool_bytes", "Size of the spool", &["kind"])];
        let table = metrics(&declared);
        assert!(
            table.ends_with("| `gannet_test_spool_bytes` | gauge | bytes | `kind` | Size of the spool |\n"),
            "{table}"
        );
    }
}
