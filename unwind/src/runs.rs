//! Runs: rows of consecutive pushes or pops, which become one row ([`crate::format`]).

use crate::format::{MAX_RUN_BYTES, PAGE_SHIFT, UnwindRule, cfa, loc};

/// Steps of a run are this close: `push` and `pop` have one byte or two. Other instructions between them would make many
/// different runs, whose rules cost more than the rows.
const MAX_STEP_BYTES: u64 = 2;
/// The first may come behind a landing pad (`endbr64`).
const MAX_FIRST_STEP_BYTES: u64 = 6;

/// Returns whether a row continues a run: by one push, or one pop, more.
pub(crate) fn extends_run(rows: &[(u64, UnwindRule)], vaddr: u64, rule: UnwindRule) -> bool {
    let (Some((start, first)), Some((before, last))) = (rows.first(), rows.last()) else { return false };
    let size = |rule: &UnwindRule| i64::from(rule.cfa_offset);
    let step = size(&rule) - size(last);
    let near = if rows.len() == 1 { MAX_FIRST_STEP_BYTES } else { MAX_STEP_BYTES };
    let plain = |rule: &UnwindRule| {
        let saved = (loc::CFA, rule.fp_offset);
        let fp_known =
            (rule.fp_kind, rule.fp_offset) == (loc::SAME, 0) || (rule.fp_kind, rule.fp_offset) == saved;
        fp_known
            && *rule
                == UnwindRule {
                    fp_kind: rule.fp_kind,
                    fp_offset: rule.fp_offset,
                    ..UnwindRule::x86_64_sp(rule.cfa_offset)
                }
    };
    if vaddr - before > near
        || vaddr - start > MAX_RUN_BYTES
        || vaddr >> PAGE_SHIFT != start >> PAGE_SHIFT
        || step.abs() != 8
        || (rows.len() > 1 && (size(&rows[1].1) - size(first)) != step)
        || !plain(first)
        || !plain(&rule)
    {
        return false;
    }
    // The frame pointer's slot must be there exactly while the frame is large enough to hold it.
    let all = || rows.iter().map(|(_, rule)| rule).chain([&rule]);
    let Some(slot) = all().find(|rule| rule.fp_kind == loc::CFA).map(|rule| rule.fp_offset) else {
        return true;
    };
    all().all(|rule| {
        let holds = size(rule) >= -i64::from(slot);
        if holds { (rule.fp_kind, rule.fp_offset) == (loc::CFA, slot) } else { rule.fp_kind == loc::SAME }
    })
}

/// Returns the rule of a run of two rows or more.
pub(crate) fn rule_of_run(rows: &[(u64, UnwindRule)]) -> UnwindRule {
    let (start, first) = rows[0];
    let (fp_kind, fp_offset) = rows
        .iter()
        .find(|(_, rule)| rule.fp_kind == loc::CFA)
        .map_or((loc::SAME, 0), |(_, rule)| (rule.fp_kind, rule.fp_offset));
    UnwindRule {
        cfa_kind: if rows[1].1.cfa_offset > first.cfa_offset { cfa::PUSHES } else { cfa::POPS },
        fp_kind,
        fp_offset,
        ra_offset: rows[1..].iter().fold(0, |steps, (vaddr, _)| steps | 1 << (vaddr - start)),
        ..first
    }
}
