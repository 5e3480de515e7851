//! The HTTP servers: one for the HTTP listener, and one for the loopback listener if there is one.

use axum::Router;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::listener::Listener;
use crate::{
    http::{HttpState, debug_router, router},
    peer::Peer,
};

/// Starts the servers, which run until `stop` and the end of their connections.
pub(crate) fn start(
    listener: Listener,
    debug_listener: Option<Listener>,
    state: HttpState,
    stop: &CancellationToken,
) -> JoinHandle<()> {
    let mut routers = vec![(listener, router(state.clone()))];
    routers.extend(debug_listener.map(|listener| (listener, debug_router(state))));
    serve(routers, stop)
}

/// Starts only the server of the loopback listener.
pub(crate) fn start_debug(listener: Listener, state: HttpState, stop: &CancellationToken) -> JoinHandle<()> {
    serve(vec![(listener, debug_router(state))], stop)
}

fn serve(routers: Vec<(Listener, Router)>, stop: &CancellationToken) -> JoinHandle<()> {
    let servers = routers.into_iter().map(|(listener, router)| {
        axum::serve(listener, router.into_make_service_with_connect_info::<Peer>())
            .with_graceful_shutdown(stop.clone().cancelled_owned())
            .into_future()
    });
    let servers = futures::future::join_all(servers);
    tokio::spawn(async move {
        for error in servers.await.into_iter().filter_map(Result::err) {
            tracing::error!(%error, "the HTTP server has failed");
        }
    })
}
