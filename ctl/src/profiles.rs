//! Stored profiles: list, download, merge and compare them, and the tables of functions.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use gannet_proto::query::{
    GetProfileRequest, ListProfilesRequest, ProfileInfo, ReadReport, Selection, TopRequest, TopResponse,
    TopRow,
};
use serde_json::{Value, json};

use crate::{
    args::{Base, Form, Format, Profiles, Select, Spans, TopArgs},
    client::{self, Collector, MAX_PROFILE_BYTES},
    deletion,
    error::Error,
    export::{self, FileFormat, Origin},
    open,
    render::{
        Console, amount, bytes, count, millis, percent, read_text, read_value, show_span, show_time,
        span_millis, table,
    },
    sql,
};

/// Profiles in one answer of the collector.
const PAGE_PROFILES: usize = 1000;

pub(crate) async fn run(
    command: Profiles,
    output: Option<PathBuf>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    match command {
        Profiles::List { select, limit } => list(&select, limit, collector, format, console).await,
        Profiles::Get { id, out, form, spans: Spans { span_id, trace_id } } => {
            let file = match output.or(out) {
                Some(file) => file,
                None if is_plain(&id) => format!("{id}.pb.gz").into(),
                None => {
                    return Err(Error::Usage(format!(
                        "`{id}` is not a profile id; `profiles list` shows the ids"
                    )));
                }
            };
            let target = Target::new(&file, form, "")?;
            let request = GetProfileRequest { id: id.clone(), span_id, trace_id };
            let answer = collector.query().get_profile(request).await;
            let mut answer = answer.map_err(|status| collector.fault(&status))?.into_inner();
            let (mut profile, mut lacks_names) = (Vec::new(), false);
            while let Some(chunk) = answer.message().await.map_err(|status| collector.fault(&status))? {
                client::append(&mut profile, &chunk.data)?;
                lacks_names |= chunk.names_incomplete;
            }
            console.note_names(lacks_names);
            let selection = Selection { profile_id: id.clone(), ..Selection::default() };
            save(&profile, &target.of(id, selection, collector).await?, None, format, console)
        }
        Profiles::Open(args) => Err(open::selection(&args, collector, console).await),
        Profiles::Merge { select, sample_type, out, form } => {
            let file = output.unwrap_or(out);
            // Before the collector merges in vain.
            let target = Target::new(&file, form, &sample_type)?;
            let selection = select.selection();
            let (merged, read) = collector.merge(selection.clone(), &sample_type, console).await?;
            let target = target.of(String::new(), selection, collector).await?;
            save(&merged, &target, Some(&read), format, console)
        }
        Profiles::Delete(args) => deletion::delete(&args, collector, format, console).await,
        Profiles::Deletions => deletion::list(collector, format, console).await,
        Profiles::Query(args) => sql::run(&args, collector, format, console).await,
        Profiles::Convert { file, out, sample_type, form } => {
            convert(&file, &output.unwrap_or(out), &sample_type, form, format, console)
        }
        Profiles::Diff { top: args, base } => {
            if !base.is_given() {
                return Err(Error::Usage(
                    "choose what to compare with: --base-query, --base-since, --base-from or --base-until"
                        .to_owned(),
                ));
            }
            top(&args, Some(&base), collector, format, console).await
        }
    }
}

/// Reports whether an id is safe as a file name.
fn is_plain(id: &str) -> bool {
    !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// A file to write, and its format.
pub(crate) struct Target<'a> {
    file: &'a Path,
    form: FileFormat,
    /// The sample type of formats that have one.
    sample_type: &'a str,
    origin: Origin,
}

impl<'a> Target<'a> {
    /// Chooses the format: that of `--as`, or that of the file's ending.
    pub(crate) fn new(file: &'a Path, form: Form, sample_type: &'a str) -> Result<Self, Error> {
        let form = match form.form {
            Some(form) => form,
            None => FileFormat::of_path(file)?,
        };
        Ok(Self { file, form, sample_type, origin: Origin::default() })
    }

    /// Sets the labels of a profile that no collector has.
    pub(crate) fn set_labels(&mut self, labels: BTreeMap<String, String>) {
        self.origin.labels = labels;
    }

    /// Adds the origin of the profile: its id, and the labels that all profiles of the selection share. Asks the collector only
    /// for a format that has a place for them.
    async fn of(mut self, id: String, selection: Selection, collector: &Collector) -> Result<Self, Error> {
        if self.form == FileFormat::Otlp {
            self.origin = Origin { id, labels: collector.shared_labels(selection).await? };
        }
        Ok(self)
    }
}

/// Converts a pprof file.
pub(crate) fn convert(
    from: &Path,
    to: &Path,
    sample_type: &str,
    form: Form,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let target = Target::new(to, form, sample_type)?;
    let bytes = fs::read(from).map_err(|source| Error::File { file: from.display().to_string(), source })?;
    save(&bytes, &target, None, format, console)
}

/// Writes a profile to a file, or to standard output for `-`. Writes a temporary file and renames it, so that an
/// existing file of that name is never half written.
pub(crate) fn save(
    profile: &[u8],
    target: &Target<'_>,
    read: Option<&ReadReport>,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let Target { file, form, sample_type, ref origin } = *target;
    if file == Path::new("-") && console.terminal && !form.is_text() {
        return Err(Error::Usage("a terminal cannot show pprof; give -O FILE or pipe the output".to_owned()));
    }
    // A download stays as the collector sent it.
    let content = match form {
        FileFormat::Pprof => Cow::Borrowed(profile),
        form => Cow::Owned(export::convert(profile, MAX_PROFILE_BYTES, form, sample_type, origin)?),
    };
    if file == Path::new("-") {
        console.out.write_all(&content)?;
        return Ok(console.out.flush()?);
    }
    let fault = |source| Error::File { file: file.display().to_string(), source };
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(format!(".{}.part", std::process::id()));
    let written = fs::write(&temporary, &content).and_then(|()| fs::rename(&temporary, file));
    if let Err(error) = written {
        // The error of the removal would hide the first one.
        let _ = fs::remove_file(&temporary);
        return Err(fault(error));
    }
    console.show(
        format,
        || {
            let mut value = json!({ "file": file.display().to_string(), "bytes": content.len() });
            if let Some(read) = read {
                value["read"] = read_value(read);
            }
            value
        },
        || {
            let wrote = format!("wrote {} ({})\n", file.display(), bytes(content.len() as u64));
            read.map_or(wrote.clone(), |read| format!("{wrote}{}\n", read_text(read)))
        },
    )
}

async fn list(
    select: &Select,
    limit: usize,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let limit = if limit == 0 { usize::MAX } else { limit };
    let (mut profiles, mut token, mut more) = (Vec::new(), String::new(), true);
    // All pages must have the same range, so `--since` is resolved once.
    let selection = select.selection();
    while more && profiles.len() < limit {
        let request = ListProfilesRequest {
            selection: Some(selection.clone()),
            limit: (limit - profiles.len()).min(PAGE_PROFILES) as u32,
            page_token: token,
        };
        let answer = collector.query().list_profiles(request).await;
        let answer = answer.map_err(|status| collector.fault(&status))?.into_inner();
        profiles.extend(answer.profiles);
        token = answer.next_page_token;
        more = !token.is_empty();
    }
    console.show(
        format,
        || json!({ "profiles": profiles.iter().map(profile_json).collect::<Vec<_>>(), "more": more }),
        || {
            if profiles.is_empty() {
                return "no profiles in this selection; widen --since or the query\n".to_owned();
            }
            let rows: Vec<_> = profiles.iter().map(row).collect();
            let mut text = table(
                ["ID", "START", ">LENGTH", "SERVICE", "NODE", "RULE", "TYPE", ">SAMPLES", ">SIZE", "REASON"],
                &rows,
            );
            if more {
                let shown = count(profiles.len(), "profile");
                let _ = writeln!(text, "the newest {shown}; there are more, --limit 0 shows all");
            }
            text
        },
    )
}

fn row(info: &ProfileInfo) -> [String; 10] {
    let label = |name: &str| info.labels.get(name).cloned().unwrap_or_else(|| "-".to_owned());
    [
        info.id.clone(),
        show_time(info.start),
        show_span(info.duration),
        label(gannet_proto::labels::SERVICE_NAME),
        label(gannet_proto::labels::NODE),
        info.rule_id.clone(),
        info.sample_types.last().cloned().unwrap_or_default(),
        info.samples.to_string(),
        bytes(info.bytes),
        info.reason.clone(),
    ]
}

fn profile_json(info: &ProfileInfo) -> Value {
    json!({
        "id": info.id, "labels": info.labels, "start_ms": millis(info.start), "duration_ms": span_millis(info.duration),
        "sample_types": info.sample_types, "samples": info.samples, "bytes": info.bytes, "rule_id": info.rule_id,
        "revision": info.revision, "reason": info.reason,
    })
}

/// Prints the functions with the highest values, compared with `base` if it is given.
pub(crate) async fn top(
    args: &TopArgs,
    base: Option<&Base>,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let TopArgs { select, sample_type, limit, interpreter_frames, hide_error_frames } = args;
    let request = TopRequest {
        selection: Some(select.selection()),
        base: base.map(|base| base.selection(select)),
        sample_type: sample_type.clone(),
        limit: *limit,
        interpreter_frames: *interpreter_frames,
        hide_error_frames: *hide_error_frames,
        ..TopRequest::default()
    };
    let answer =
        collector.query().top(request).await.map_err(|status| collector.fault(&status))?.into_inner();
    console.note_unreadable(answer.unreadable_profiles);
    console.note_names(answer.names_incomplete);
    console.show(
        format,
        || top_json(&answer),
        || if base.is_some() { diff_table(&answer) } else { top_table(&answer) },
    )
}

fn top_json(answer: &TopResponse) -> Value {
    let rows: Vec<_> = answer
        .rows
        .iter()
        .map(|row| {
            let TopRow { name, file, self_, total, base_self, base_total } = row;
            json!({
                "name": name, "file": file, "self": self_, "total": total, "base_self": base_self,
                "base_total": base_total,
            })
        })
        .collect();
    json!({
        "unit": answer.unit, "sample_type": answer.sample_type, "total": answer.total,
        "base_total": answer.base_total, "rows": rows, "unreadable_profiles": answer.unreadable_profiles,
        "names_incomplete": answer.names_incomplete, "read": answer.read.as_ref().map(read_value),
    })
}

fn top_table(answer: &TopResponse) -> String {
    if answer.rows.is_empty() {
        return "no samples in this selection; widen --since or the query\n".to_owned();
    }
    let rows: Vec<_> = answer
        .rows
        .iter()
        .map(|row| {
            [
                amount(row.self_.into(), &answer.unit),
                percent(row.self_, answer.total),
                amount(row.total.into(), &answer.unit),
                percent(row.total, answer.total),
                row.name.clone(),
                row.file.clone(),
            ]
        })
        .collect();
    format!(
        "{}: {} in total\n{}",
        answer.sample_type,
        amount(answer.total.into(), &answer.unit),
        table([">SELF", ">SELF%", ">TOTAL", ">TOTAL%", "FUNCTION", "FILE"], &rows)
    )
}

/// Formats a comparison, the largest increase first. It compares shares, because two selections rarely last equally
/// long.
fn diff_table(answer: &TopResponse) -> String {
    if answer.rows.is_empty() {
        return "no samples in either selection; widen the times or the queries\n".to_owned();
    }
    let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
    let change = |row: &TopRow| share(row.self_, answer.total) - share(row.base_self, answer.base_total);
    let mut sorted: Vec<_> = answer.rows.iter().collect();
    sorted.sort_by(|a, b| change(b).total_cmp(&change(a)).then_with(|| a.name.cmp(&b.name)));
    let rows: Vec<_> = sorted
        .into_iter()
        .map(|row| {
            [
                format!("{:+.2}", change(row)),
                percent(row.self_, answer.total),
                percent(row.base_self, answer.base_total),
                amount(row.self_.into(), &answer.unit),
                amount(row.base_self.into(), &answer.unit),
                format!("{:+.2}", share(row.total, answer.total) - share(row.base_total, answer.base_total)),
                row.name.clone(),
                row.file.clone(),
            ]
        })
        .collect();
    format!(
        "{}: {} against {}; changes in percentage points of the total\n{}",
        answer.sample_type,
        amount(answer.total.into(), &answer.unit),
        amount(answer.base_total.into(), &answer.unit),
        table([">CHANGE", ">SELF%", ">BASE%", ">SELF", ">BASE", ">TOTAL CHANGE", "FUNCTION", "FILE"], &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> TopResponse {
        let row = |name: &str, self_, total, base_self, base_total| TopRow {
            name: name.to_owned(),
            file: "app".to_owned(),
            self_,
            total,
            base_self,
            base_total,
        };
        TopResponse {
            unit: "nanoseconds".to_owned(),
            total: 4_000_000_000,
            base_total: 1_000_000_000,
            sample_type: "cpu/nanoseconds".to_owned(),
            unreadable_profiles: 0,
            names_incomplete: false,
            read: None,
            rows: vec![
                row("work", 1_000_000_000, 1_000_000_000, 500_000_000, 500_000_000),
                row("main", 3_000_000_000, 4_000_000_000, 500_000_000, 1_000_000_000),
            ],
        }
    }

    #[test]
    fn a_table_shows_self_and_total_with_their_shares() {
        insta::assert_snapshot!(top_table(&answer()), @r"
        cpu/nanoseconds: 4.00s in total
         SELF   SELF%  TOTAL   TOTAL%  FUNCTION  FILE
        1.00s  25.00%  1.00s   25.00%  work      app
        3.00s  75.00%  4.00s  100.00%  main      app
        ");
    }

    #[test]
    fn a_comparison_starts_with_the_largest_increase_of_share() {
        insta::assert_snapshot!(diff_table(&answer()), @r"
        cpu/nanoseconds: 4.00s against 1.00s; changes in percentage points of the total
        CHANGE   SELF%   BASE%   SELF      BASE  TOTAL CHANGE  FUNCTION  FILE
        +25.00  75.00%  50.00%  3.00s  500.00ms         +0.00  main      app
        -25.00  25.00%  50.00%  1.00s  500.00ms        -25.00  work      app
        ");
    }

    #[test]
    fn a_file_is_written_completely_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console { out: &mut out, err: &mut err, terminal: true };
        let file = dir.path().join("a.pb.gz");
        let missing = dir.path().join("no/a.pb.gz");
        let target = |file| Target::new(file, Form { form: Some(FileFormat::Pprof) }, "").unwrap();
        save(b"profile", &target(&file), None, Format::Table, &mut console).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"profile");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = save(b"x", &target(&missing), None, Format::Table, &mut console).unwrap_err();
        assert!(error.to_string().contains("a.pb.gz"), "{error}");
        let error = save(b"x", &target(Path::new("-")), None, Format::Table, &mut console).unwrap_err();
        assert_eq!(error.exit_code(), 2);
    }
}
