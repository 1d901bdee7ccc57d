//! Renews credentials that S3 says have expired. The SDK would use them as long as their source
//! said that they are valid, upload after upload.

use aws_sdk_s3::config::{
    ConfigBag, IdentityCache, ResolveCachedIdentity, RuntimeComponents, SharedIdentityCache,
};
use aws_smithy_runtime_api::client::identity::{IdentityFuture, SharedIdentityResolver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Minimum time between two renewals: many requests fail at once.
const MIN_INTERVAL: Duration = Duration::from_secs(5);

/// A cache of credentials that can be emptied. Clones share one.
#[derive(Clone, Debug)]
pub struct RenewableIdentities(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    cache: SharedIdentityCache,
    renewed: Option<Instant>,
}

impl RenewableIdentities {
    pub fn new() -> RenewableIdentities {
        let state = State {
            cache: IdentityCache::lazy().build(),
            renewed: None,
        };
        RenewableIdentities(Arc::new(Mutex::new(state)))
    }

    /// Forgets the credentials, unless they were renewed less than [`MIN_INTERVAL`] ago.
    pub fn renew(&self) {
        let mut state = self.state();
        if state
            .renewed
            .is_some_and(|renewed| renewed.elapsed() < MIN_INTERVAL)
        {
            return;
        }
        *state = State {
            cache: IdentityCache::lazy().build(),
            renewed: Some(Instant::now()),
        };
        log::warn!("the store says that the credentials have expired: asking for new ones");
    }

    // A std lock: never held across an await.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResolveCachedIdentity for RenewableIdentities {
    fn resolve_cached_identity<'a>(
        &'a self,
        resolver: SharedIdentityResolver,
        components: &'a RuntimeComponents,
        bag: &'a ConfigBag,
    ) -> IdentityFuture<'a> {
        let cache = self.state().cache.clone();
        IdentityFuture::new(async move {
            cache
                .resolve_cached_identity(resolver, components, bag)
                .await
        })
    }
}
