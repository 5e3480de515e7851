//! Profiles of one stream in one zstd frame.

use gannet_collector::{Collector, Running};
use gannet_proto::{
    ingest::{Batch, batch::Piece, push_response::Message},
    pprof::{Encoding, PieceEncoder, Profile, decode, encode_as, inflate},
    query::{FlameGraphRequest, ListProfilesRequest},
};
use rstest::rstest;
use tonic::Code;

use crate::{
    store::list,
    support::{Pusher, batch, config_with, download, eventually, metric, now_ms, queries},
};

const RECEIVED: &str = "gannet_collector_ingest_received_bytes_total";

async fn start_with(dir: &std::path::Path, streams: u32) -> Running {
    Collector::start(config_with(dir, |config| config.ingest.piece_streams = streams)).await.unwrap()
}

/// Returns the batch with its profile as the next piece.
fn piece(encoder: &mut PieceEncoder, batch: &Batch) -> Batch {
    let raw = inflate(&batch.pprof, 1 << 20).unwrap();
    let (number, pprof) = encoder.encode(&raw).unwrap();
    Batch { piece: Some(Piece { number, bytes: raw.len() as u64 }), pprof, ..batch.clone() }
}

fn profile(batch: &Batch) -> Profile {
    decode(&batch.pprof, 1 << 20).unwrap()
}

/// Checks that pieces, other batches and refused ones share a stream, and that the store has what zstd would have brought.
#[tokio::test]
async fn pieces_are_stored_as_the_profiles_in_zstd() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), 1).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    assert_eq!(pusher.limits.encodings, ["zstd", "zstd-pieces"]);
    let mut encoder = PieceEncoder::new().unwrap();
    let path = (0..60_u32)
        .map(|i| format!("function_{}", i.wrapping_mul(0x9e37_79b9)))
        .collect::<Vec<_>>()
        .join(";");
    let sent: Vec<Batch> =
        (0..5).map(|n| batch("shop", now_ms(), &[(&path, 3 + n), ("main;idle", 1)])).collect();
    let mut wire = 0;
    for (n, whole) in sent.iter().enumerate() {
        let mut next = piece(&mut encoder, whole);
        wire += next.pprof.len();
        pusher.store(next.clone()).await;
        assert!(n == 0 || next.pprof.len() * 5 < whole.pprof.len(), "{} bytes", next.pprof.len());
        // A refused batch is part of the frame all the same.
        next = piece(&mut encoder, &batch("shop", now_ms(), &[("main", 1)]));
        next.samples = 9;
        wire += next.pprof.len();
        assert!(
            matches!(pusher.push(next).await, Message::Refused(refused) if refused.code == "count_mismatch")
        );
    }
    assert_eq!(metric(running.http_addr, RECEIVED).await as usize, wire);
    let gzip = batch("shop", now_ms(), &[("main;work", 7)]);
    pusher.store(gzip.clone()).await;
    // Sent again, it is a piece with another number, and the same batch.
    let again = piece(&mut encoder, &sent[0]);
    assert!(matches!(pusher.push(again).await, Message::Accepted(accepted) if accepted.duplicate));
    encoder.restart();
    let last = batch("shop", now_ms(), &[("main;last", 2)]);
    pusher.store(piece(&mut encoder, &last)).await;

    let listed = list(&running).await;
    assert_eq!(listed.len(), 7);
    for whole in sent.iter().chain([&last]) {
        let stored = listed.iter().find(|info| info.id == whole.batch_id).unwrap();
        assert_eq!(stored.bytes, encode_as(&profile(whole), Encoding::Zstd).len() as u64);
        let got = download(&running, &whole.batch_id).await.unwrap();
        assert_eq!(decode(&got, 1 << 20).unwrap(), profile(whole));
    }
    let graph = queries(&running).await.flame_graph(FlameGraphRequest::default()).await.unwrap().into_inner();
    assert_eq!((graph.unreadable_profiles, graph.total), (0, (25 + 5 + 7 + 2) * 10_000_000));
    running.shutdown().await;
}

/// Checks that the collector offers pieces to N streams at a time, and counts those that ended no more.
#[tokio::test]
async fn streams_above_the_limit_have_no_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), 1).await;
    let first = Pusher::open(running.grpc_addr).await;
    let mut second = Pusher::open(running.grpc_addr).await;
    assert_eq!((first.limits.encodings.len(), &*second.limits.encodings), (2, &["zstd".to_owned()][..]));
    let mut encoder = PieceEncoder::new().unwrap();
    second.send(piece(&mut encoder, &batch("shop", now_ms(), &[("main", 1)]))).await;
    let status = second.end().await;
    assert_eq!(status.code(), Code::DataLoss);
    assert!(status.message().contains("zstd-pieces"), "{status}");
    drop(first);
    eventually("the place is free", || async {
        Pusher::open(running.grpc_addr).await.limits.encodings.len() == 2
    })
    .await;
    running.shutdown().await;
}

/// Checks that a bad piece ends its stream with an error that names the field, and harms no batch before it.
#[rstest]
#[case::lost(|b: &mut Batch| b.piece.as_mut().unwrap().number = 3, "piece.number is 3, after 1")]
#[case::size(|b: &mut Batch| b.piece.as_mut().unwrap().bytes += 1, "piece.bytes")]
#[case::bomb(|b: &mut Batch| b.piece.as_mut().unwrap().bytes = 1 << 40, "piece.bytes is 1099511627776, the limit is 1048576")]
#[case::cut(|b: &mut Batch| b.pprof.truncate(b.pprof.len() - 3), "piece.bytes")]
#[case::text(|b: &mut Batch| b.pprof = b"not a piece".to_vec(), "pprof is not the next piece")]
#[tokio::test]
async fn a_bad_piece_ends_only_its_stream(#[case] spoil: fn(&mut Batch), #[case] says: &str) {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), 2).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let mut encoder = PieceEncoder::new().unwrap();
    let good = batch("shop", now_ms(), &[("main;work", 3)]);
    assert!(pusher.send(piece(&mut encoder, &good)).await);
    let whole = batch("shop", now_ms(), &[("main;other", 4)]);
    let mut bad = piece(&mut encoder, &whole);
    spoil(&mut bad);
    assert!(pusher.send(bad).await);
    let status = pusher.end().await;
    assert_eq!(status.code(), Code::DataLoss, "{status}");
    assert!(status.message().contains(says) && status.message().contains(&whole.batch_id), "{status}");
    // As an agent does: all that has no answer once more, on another stream.
    let mut next = Pusher::open(running.grpc_addr).await;
    encoder.restart();
    assert_eq!(next.store_all(&[good, whole].map(|batch| piece(&mut encoder, &batch))).await, (1, 0));
    let request = ListProfilesRequest::default();
    let listed = queries(&running).await.list_profiles(request).await.unwrap().into_inner();
    assert_eq!(listed.profiles.iter().map(|info| info.samples).sum::<u64>(), 7);
    running.shutdown().await;
}

/// Checks that the content of a piece is a profile: a packed one inside would be stored, and no query could read it.
#[tokio::test]
async fn a_piece_with_other_content_is_refused_alone() {
    let dir = tempfile::tempdir().unwrap();
    let running = start_with(dir.path(), 1).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let mut encoder = PieceEncoder::new().unwrap();
    let whole = batch("shop", now_ms(), &[("main;work", 3)]);
    for content in [whole.pprof.clone(), encode_as(&profile(&whole), Encoding::Zstd), vec![0xff; 90], vec![]]
    {
        let (number, pprof) = encoder.encode(&content).unwrap();
        let piece = Some(Piece { number, bytes: content.len() as u64 });
        match pusher.push(Batch { piece, pprof, ..whole.clone() }).await {
            Message::Refused(refused) => assert_eq!(refused.code, "not_pprof", "{}", refused.reason),
            other => panic!("not refused: {other:?}"),
        }
    }
    pusher.store(piece(&mut encoder, &whole)).await;
    running.shutdown().await;
}
