//! Deletions of stored profiles.

use std::io::{self, BufRead as _, IsTerminal as _};

use gannet_proto::query::{DeleteProfilesRequest, DeleteProfilesResponse, Deletion, ListDeletionsRequest};
use serde_json::{Value, json};

use crate::{
    args::{Delete, Format},
    client::Collector,
    error::Error,
    render::{Console, bytes, clean, count, millis, show_time, table},
};

/// Counts the profiles, asks unless `--yes` is given, and deletes them.
pub(crate) async fn delete(
    args: &Delete,
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let request = args.request();
    let call = async |request: DeleteProfilesRequest| {
        let answer = collector.deletions().delete_profiles(request).await;
        answer.map(tonic::Response::into_inner).map_err(|status| collector.fault(&status))
    };
    // Without a question, the counts come with the deletion.
    if args.dry_run || !args.yes {
        let found = call(request.clone()).await?;
        note_unreadable(&found, console);
        if args.dry_run || found.profiles == 0 {
            return show(&found, format, console);
        }
        if !io::stdin().is_terminal() {
            return Err(Error::Usage(format!(
                "this would delete {}; give --yes to delete without a question, or --dry-run to only see it",
                summary(&found)
            )));
        }
        // A closed standard error must not fail the command.
        let _ = write!(console.err, "delete {}? [y/N] ", summary(&found));
        let _ = console.err.flush();
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Err(Error::Failed("nothing is deleted".to_owned()));
        }
    }
    let deleted = call(DeleteProfilesRequest { dry_run: false, ..request }).await?;
    if args.yes {
        note_unreadable(&deleted, console);
    }
    show(&deleted, format, console)
}

fn summary(of: &DeleteProfilesResponse) -> String {
    let DeleteProfilesResponse { profiles, samples, bytes: size, series, .. } = of;
    format!(
        "{} of {} with {}, {}",
        count(*profiles as usize, "profile"),
        // `count` adds an s, which "series" does not take.
        if *series == 1 { "1 series".to_owned() } else { format!("{series} series") },
        count(*samples as usize, "sample"),
        bytes(*size)
    )
}

fn show(of: &DeleteProfilesResponse, format: Format, console: &mut Console<'_>) -> Result<(), Error> {
    let DeleteProfilesResponse { deletion_id, profiles, samples, bytes, series, unreadable_objects } = of;
    let is_dry = deletion_id.is_empty();
    console.show(
        format,
        || {
            json!({
                "deletion_id": if is_dry { Value::Null } else { deletion_id.as_str().into() },
                "profiles": profiles, "samples": samples, "bytes": bytes, "series": series,
                "unreadable_objects": unreadable_objects,
            })
        },
        || match (is_dry, *profiles) {
            (true, 0) => "no profile matches; nothing is deleted\n".to_owned(),
            (true, _) => format!("would delete {}\n", summary(of)),
            (false, _) => format!("deleted {}; deletion {}\n", summary(of), clean(deletion_id)),
        },
    )
}

/// Reports on standard error what the counts lack.
fn note_unreadable(of: &DeleteProfilesResponse, console: &mut Console<'_>) {
    if of.unreadable_objects > 0 {
        let lacks = count(of.unreadable_objects as usize, "object");
        let _ = writeln!(
            console.err,
            "gannetctl: the collector cannot read {lacks}, which may hold other such profiles, and does not delete these; run \
             `gannet-collector verify`"
        );
    }
}

/// Lists the deletions that the collector has not carried out yet.
pub(crate) async fn list(
    collector: &Collector,
    format: Format,
    console: &mut Console<'_>,
) -> Result<(), Error> {
    let answer = collector.deletions().list_deletions(ListDeletionsRequest {}).await;
    let deletions = answer.map_err(|status| collector.fault(&status))?.into_inner().deletions;
    console.show(
        format,
        || json!({ "deletions": deletions.iter().map(entry_json).collect::<Vec<_>>() }),
        || {
            if deletions.is_empty() {
                return "all deletions are carried out\n".to_owned();
            }
            let rows: Vec<_> = deletions.iter().map(row).collect();
            table(["AT", "WHO", "SELECTOR", "FROM", "UNTIL", "ID"], &rows)
        },
    )
}

fn row(of: &Deletion) -> [String; 6] {
    let Deletion { id, query, from, until, who, at } = of;
    let selector = if query.is_empty() { "{}".to_owned() } else { query.clone() };
    [show_time(*at), who.clone(), selector, show_time(*from), show_time(*until), id.clone()]
}

fn entry_json(of: &Deletion) -> Value {
    let Deletion { id, query, from, until, who, at } = of;
    json!({
        "id": id, "query": query, "from_ms": millis(*from), "until_ms": millis(*until), "who": who, "at_ms": millis(*at),
    })
}
