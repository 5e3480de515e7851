//! The layer that authenticates and authorizes each gRPC call before its service sees it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tonic::body::Body;
use tower::{Layer, Service};

use super::{Auth, roles::required_role};
use crate::peer::Peer;

/// Wraps the gRPC services with [`Auth`].
#[derive(Clone)]
pub(crate) struct AuthLayer(pub(crate) Arc<Auth>);

impl<S> Layer<S> for AuthLayer {
    type Service = AuthService<S>;

    fn layer(&self, inner: S) -> AuthService<S> {
        AuthService { auth: Arc::clone(&self.0), inner }
    }
}

/// A service whose calls carry their [`super::Caller`] in the request's extensions.
#[derive(Clone)]
pub(crate) struct AuthService<S> {
    auth: Arc<Auth>,
    inner: S,
}

impl<S> Service<http::Request<Body>> for AuthService<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        // `poll_ready` reserved capacity in `self.inner`, so this call must use that one and leave the clone behind.
        let fresh = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, fresh);
        let auth = Arc::clone(&self.auth);
        Box::pin(async move {
            let Some(role) = required_role(request.uri().path()) else { return inner.call(request).await };
            let peer = request.extensions().get::<Peer>().cloned();
            let token = request.headers().get(http::header::AUTHORIZATION).and_then(|v| v.to_str().ok());
            let token = token.map(str::to_owned);
            let caller = auth.authenticate(peer.as_ref(), token.as_deref()).await;
            match caller.and_then(|caller| auth.authorize(&caller, role).map(|()| caller)) {
                Ok(caller) => {
                    request.extensions_mut().insert(caller);
                    inner.call(request).await
                }
                Err(status) => {
                    tracing::debug!(
                        path = request.uri().path(), peer = ?peer.map(|p| p.addr), %status, "refused a call"
                    );
                    Ok(status.into_http())
                }
            }
        })
    }
}
