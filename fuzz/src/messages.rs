//! Profiles and the messages of all services.

use gannet_proto::{
    control::{self, server_message},
    foreign::{kubelet, parca, pyroscope},
    ingest::{self, push_request},
    labels,
    ledger::Ledger,
    pprof::{self, FlameTree, Merger, PIECES_WINDOW, PieceDecoder, PieceEncoder, Profile, Side},
    query,
};
use prost::Message;

use crate::rules;

/// Inflated bytes of a profile.
const MAX_BYTES: usize = 4 << 20;
const PARTS: (usize, usize) = (3, 1000);

/// A profile, packed or plain.
pub(crate) fn pprof(bytes: &[u8]) {
    if let Ok(profile) = pprof::decode(bytes, MAX_BYTES) {
        use_profile(profile);
    }
    // The fuzzer cannot pack.
    if let Ok(profile) = Profile::decode(bytes) {
        use_profile(profile);
    }
}

/// Batches with pieces of one stream, each behind two bytes of its length. After them, and whatever they were, a sender and the
/// receiver agree on another frame.
pub(crate) fn pieces(bytes: &[u8]) {
    let (Some(mut encoder), Some(mut decoder)) = (PieceEncoder::new(), PieceDecoder::new()) else { return };
    let mut rest = bytes;
    while let [low, high, after @ ..] = rest {
        let (message, next) = after.split_at(after.len().min(usize::from(u16::from_le_bytes([*low, *high]))));
        rest = next;
        let Ok(ingest::Batch { piece: Some(piece), pprof, .. }) = ingest::Batch::decode(message) else {
            continue;
        };
        if let Ok(raw) = decoder.decode(piece.number, piece.bytes, &pprof) {
            assert!(raw.len() as u64 == piece.bytes && raw.len() <= PIECES_WINDOW);
        }
    }
    let raw = &bytes[..bytes.len().min(PIECES_WINDOW)];
    for _ in 0..2 {
        let (number, piece) = encoder.encode(raw).expect("a profile within the window");
        let read = decoder.decode(number, raw.len() as u64, &piece).expect("a piece of the encoder");
        assert!(read == raw, "a piece is another profile");
    }
}

/// Does with a profile what collector and gannetctl do with those of agents. A checked one must hold in all of it.
fn use_profile(profile: Profile) {
    let Ok(summary) = pprof::check(&profile) else { return };
    let stacks = profile.sample.len();
    let packed = pprof::encode(&profile);
    let read = pprof::decode(&packed, MAX_BYTES).expect("a packed profile can be read");
    assert!(read == profile, "a packed profile is another one");
    let last = pprof::sample_type_index(&profile, "").expect("a checked profile has a type");
    let mut tree = FlameTree::new();
    if tree.add(&profile, last, Side::Main).is_ok() {
        let total = tree.total(Side::Main);
        assert_eq!(i64::try_from(total).unwrap_or(i64::MAX), summary.totals[last]);
        let _ = (tree.top(10), pprof::flat(tree.prune(100)));
    }
    let _ = (pprof::folded(&profile, last), pprof::samples(&profile));
    let mut merger = Merger::new();
    if merger.add(&profile).is_ok() && merger.add(&profile).is_ok() {
        let merged = merger.finish().expect("two profiles were added");
        let checked = pprof::check(&merged).expect("a merged profile is valid");
        for (once, twice) in summary.totals.iter().zip(&checked.totals) {
            assert_eq!(once.saturating_mul(2), *twice);
        }
    }
    let parts = pprof::split(profile, PARTS.0, PARTS.1);
    let mut total = 0_i64;
    for part in &parts {
        assert!(part.sample.len() <= PARTS.0.max(1));
        total = total.saturating_add(pprof::check(part).expect("a part is valid").totals[last]);
    }
    assert_eq!(total, summary.totals[last]);
    assert_eq!(parts.iter().map(|part| part.sample.len()).sum::<usize>(), stacks);
}

/// Reads a message of one type, and writes it again.
fn read<M: Message + Default + PartialEq>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    let written = message.encode_to_vec();
    assert_eq!(written.len(), message.encoded_len());
    let again = M::decode(&*written).expect("a written message can be read");
    // NaN is unequal to itself.
    assert!(again == message || again.encode_to_vec() == written, "a written message is another one");
    Some(message)
}

/// Any message of the services; the first byte chooses its type.
pub(crate) fn any(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 16 {
        0 => {
            let request = read::<ingest::PushRequest>(bytes);
            if let Some(push_request::Message::Batch(batch)) = request.and_then(|request| request.message) {
                let _ = labels::check(&batch.labels);
                if let Some(Ok(ledger)) = batch.ledger.map(Ledger::try_from) {
                    let _ = (ledger.check(), ledger.unaccounted(), ledger.lost_total());
                    let mut sum = ledger.clone();
                    sum.merge(&ledger);
                }
                pprof(&batch.pprof);
            }
        }
        1 => drop(read::<ingest::PushResponse>(bytes)),
        2 => drop(read::<control::AgentMessage>(bytes)),
        3 => {
            let message = read::<control::ServerMessage>(bytes);
            if let Some(server_message::Message::Rules(set)) = message.and_then(|message| message.message) {
                rules::check(set.rules);
            }
        }
        4 => {
            if let Some(request) = read::<control::SetTriggersRequest>(bytes) {
                rules::check(request.rules);
            }
        }
        5 => drop(read::<control::ListNodesResponse>(bytes)),
        6 => drop(read::<control::CaptureProgress>(bytes)),
        7 => drop(read::<control::ExplainResponse>(bytes)),
        8 => drop(read::<query::FlameGraphResponse>(bytes)),
        9 => drop(read::<query::MergeProgress>(bytes)),
        10 => drop(read::<query::TimelineResponse>(bytes)),
        11 => drop(read::<query::SeriesResponse>(bytes)),
        12 => drop(read::<kubelet::Pod>(bytes)),
        13 => drop(read::<parca::WriteRawRequest>(bytes)),
        14 => drop(read::<pyroscope::PushRequest>(bytes)),
        _ => drop(read::<control::Rollout>(bytes)),
    }
}
