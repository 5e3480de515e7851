//! Tokens of service accounts: the Kubernetes API says whose they are.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::{Api, Client, api::PostParams};
use sha2::{Digest as _, Sha256};

/// How long an answer holds: a token that is taken back is refused after that.
const GOOD_FOR: Duration = Duration::from_secs(60);
const BAD_FOR: Duration = Duration::from_secs(10);
/// Tokens whose answers are remembered.
const MOST: usize = 16_384;
const TIMEOUT: Duration = Duration::from_secs(10);
/// Where the API says on which node the token's pod runs.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Why a token is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReviewError {
    /// The API says no.
    #[error("the token is not valid here: {0}; is its audience the collector's --token-audience?")]
    Refused(String),
    /// The API does not say.
    #[error("the Kubernetes API cannot be asked about tokens: {0}; may the collector create tokenreviews?")]
    Unreachable(String),
}

/// Whose a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reviewed {
    pub(crate) name: String,
    pub(crate) groups: Vec<String>,
    /// Of the pod that it is bound to; Kubernetes says it from 1.30 on.
    pub(crate) node: Option<String>,
}

/// An answer, and until when it holds.
type Known = (Instant, Result<Reviewed, ReviewError>);

/// Asks the API, and remembers what it said.
pub(crate) struct Reviewer {
    api: Api<TokenReview>,
    audience: String,
    /// By hash: no token is kept.
    known: Mutex<HashMap<[u8; 32], Known>>,
}

impl Reviewer {
    pub(crate) fn new(client: Client, audience: String) -> Self {
        Self { api: Api::all(client), audience, known: Mutex::default() }
    }

    /// Whose token this is.
    pub(crate) async fn review(&self, token: &str) -> Result<Reviewed, ReviewError> {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some((until, answer)) = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&hash)
            && *until > Instant::now()
        {
            return answer.clone();
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![self.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let params = PostParams::default();
        let asked = tokio::time::timeout(TIMEOUT, self.api.create(&params, &review)).await;
        let status = match asked {
            Err(_) => {
                return Err(ReviewError::Unreachable(format!("no answer within {} s", TIMEOUT.as_secs())));
            }
            Ok(Err(error)) => return Err(ReviewError::Unreachable(error.to_string())),
            Ok(Ok(review)) => review.status.unwrap_or_default(),
        };
        // An API that knows no audiences names none, and would take the token of any other service.
        let for_us = status.audiences.as_ref().is_some_and(|them| them.contains(&self.audience));
        let answer = match (status.authenticated, status.user) {
            (Some(true), Some(user)) if for_us => Ok(read(user)),
            (Some(true), _) => {
                Err(ReviewError::Refused(format!("it is not for the audience {}", self.audience)))
            }
            _ => {
                let why = status.error.unwrap_or_else(|| "it is not known, or has expired".to_owned());
                Err(ReviewError::Refused(why))
            }
        };
        let until = Instant::now() + if answer.is_ok() { GOOD_FOR } else { BAD_FOR };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            let now = Instant::now();
            known.retain(|_, (until, _)| *until > now);
            if known.len() >= MOST {
                known.clear();
            }
        }
        known.insert(hash, (until, answer.clone()));
        answer
    }
}

fn read(user: UserInfo) -> Reviewed {
    let UserInfo { username, groups, extra, uid: _ } = user;
    Reviewed {
        name: username.unwrap_or_default(),
        groups: groups.unwrap_or_default(),
        node: extra.and_then(|mut extra| extra.remove(NODE_NAME)?.into_iter().next()),
    }
}
