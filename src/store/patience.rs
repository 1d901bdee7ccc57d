//! How long the server waits for a store: no request may be silent for longer than the timeouts
//! of the server.
//!
//! A request that takes long is no failure as long as it makes progress, so the time counts from
//! its last sign of life. Two requests are given more from the beginning, as a store may do much
//! for them before it says anything: a CompleteMultipartUpload of many parts, and a copy.

use super::{
    Attributes, Condition, Copied, CopySource, IncompleteUpload, Key, Limits, ListRequest, Object,
    Page, Part, PartSource, Result, Store, StoreError,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, sleep_until};

/// What a store is given for each part of a CompleteMultipartUpload: 200 s for 10,000 parts.
pub(super) const TIME_PER_PART: Duration = Duration::from_millis(20);
/// How many bytes a store copies in a second at least: 512 s for 5 GiB.
const COPIED_PER_SECOND: u64 = 10 * 1024 * 1024;

/// Limit on the time that a store can ask for in advance.
const MAX_IN_ADVANCE: Duration = Duration::from_secs(24 * 60 * 60);
/// How long a store may be silent, unless the settings say otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

tokio::task_local! {
    static CURRENT: SignsOfLife;
}

/// Tells the server that a request to the store makes progress. A store whose requests may take
/// longer than the server's timeouts takes it at the beginning of the request, and calls
/// [`SignsOfLife::give`] whenever something has moved.
#[derive(Clone, Debug)]
pub struct SignsOfLife {
    /// When the last one was given; later than now if the store has been given time in advance.
    // A std lock: never held across an await.
    last: Arc<Mutex<Instant>>,
    /// How long the request may be silent.
    timeout: Duration,
    /// Why the last try failed, if one did.
    // A std lock: never held across an await.
    last_failure: Arc<Mutex<Option<String>>>,
    /// Those of the request of which this one is a part.
    outer: Option<Arc<SignsOfLife>>,
}

impl SignsOfLife {
    /// Those of the request that the current task carries out. A task that the store starts needs a
    /// clone. Outside a request of the server they go nowhere.
    pub fn current() -> SignsOfLife {
        match CURRENT.try_with(SignsOfLife::clone) {
            Ok(signs) => signs,
            Err(_outside) => SignsOfLife {
                last: Arc::new(Mutex::new(Instant::now())),
                timeout: DEFAULT_TIMEOUT,
                last_failure: Arc::default(),
                outer: None,
            },
        }
    }

    /// Those of a request that begins now, inside the current one if there is one.
    fn begin(timeout: Duration, in_advance: Duration) -> SignsOfLife {
        let signs = SignsOfLife {
            last: Arc::new(Mutex::new(Instant::now())),
            timeout,
            last_failure: Arc::default(),
            outer: CURRENT.try_with(|outer| Arc::new(outer.clone())).ok(),
        };
        signs.give_in_advance(in_advance);
        signs
    }

    /// Says that the request has made progress now.
    pub fn give(&self) {
        self.give_in_advance(Duration::ZERO);
    }

    /// Says that the request has made progress now, and asks for this much more time until the next
    /// sign, a day at most, for a step that is known to take long in silence.
    pub fn give_in_advance(&self, more: Duration) {
        self.extend(Instant::now() + more.min(MAX_IN_ADVANCE));
    }

    /// Says why a try failed that another one follows. If the request is given up before that is
    /// answered, its error has this reason.
    pub fn note_failure(&self, why: String) {
        if let Some(outer) = &self.outer {
            outer.note_failure(why.clone());
        }
        *self.last_failure() = Some(why);
    }

    /// The end of a sentence about the request: why its last try failed, if one did.
    pub(super) fn describe_last_failure(&self) -> String {
        match &*self.last_failure() {
            Some(why) => format!(" (its last try: {why})"),
            None => String::new(),
        }
    }

    /// How long the request may be silent: the server's `open_timeout` or `close_timeout`.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    fn last_failure(&self) -> MutexGuard<'_, Option<String>> {
        self.last_failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of the outer request too, which would end this one with itself.
    fn extend(&self, to: Instant) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        *last = to.max(*last);
        if let Some(outer) = &self.outer {
            outer.extend(to);
        }
    }

    fn last(&self) -> Instant {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a store may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For requests that open, look, read, list, delete, begin an upload or abort it.
    pub open: Duration,
    /// For requests that send or make content.
    pub close: Duration,
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            open: DEFAULT_TIMEOUT,
            close: DEFAULT_TIMEOUT,
        }
    }
}

/// A store whose requests fail if they are silent for too long. Their futures are dropped then.
pub struct PatientStore {
    store: Arc<dyn Store>,
    timeouts: Timeouts,
}

impl PatientStore {
    /// Limits the requests to this store.
    pub fn new(store: Arc<dyn Store>, timeouts: Timeouts) -> PatientStore {
        PatientStore { store, timeouts }
    }

    /// A request that makes and removes no object.
    async fn look<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        let timeout = self.timeouts.open;
        let signs = SignsOfLife::begin(timeout, Duration::ZERO);
        match wait_for_signs(request, &signs).await {
            Some(result) => result,
            None => Err(StoreError::Other(silence(&signs))),
        }
    }

    /// A request that may have taken effect although it was dropped.
    async fn change<T>(
        &self,
        request: impl Future<Output = Result<T>>,
        timeout: Duration,
        in_advance: Duration,
    ) -> Result<T> {
        let signs = SignsOfLife::begin(timeout, in_advance);
        match wait_for_signs(request, &signs).await {
            Some(result) => result,
            None => Err(StoreError::Unknown(silence(&signs))),
        }
    }
}

fn silence(signs: &SignsOfLife) -> String {
    let time = humantime::format_duration(signs.timeout);
    let last_failure = signs.describe_last_failure();
    format!("the store did not respond for {time}{last_failure}")
}

/// Waits for the request as long as it gives signs of life. `None` if it has been silent for the
/// timeout, counted from `in_advance` after its beginning.
#[cfg(any(feature = "s3", test))]
pub(super) async fn wait<T>(
    request: impl Future<Output = T>,
    timeout: Duration,
    in_advance: Duration,
) -> Option<T> {
    wait_for_signs(request, &SignsOfLife::begin(timeout, in_advance)).await
}

/// As [`wait`], with the signs of life that the request gives.
async fn wait_for_signs<T>(request: impl Future<Output = T>, signs: &SignsOfLife) -> Option<T> {
    let timeout = signs.timeout;
    let request = CURRENT.scope(signs.clone(), request);
    tokio::pin!(request);
    loop {
        let deadline = signs.last() + timeout;
        tokio::select! {
            biased;
            done = &mut request => return Some(done),
            () = sleep_until(deadline) => {}
        }
        if signs.last() + timeout <= deadline {
            return None;
        }
    }
}

/// What a copy of this many bytes is given.
pub(super) fn copy_time(bytes: u64) -> Duration {
    Duration::from_secs(bytes / COPIED_PER_SECOND)
}

#[async_trait]
impl Store for PatientStore {
    fn limits(&self) -> Limits {
        self.store.limits()
    }

    async fn head(&self, key: &Key) -> Result<Object> {
        self.look(self.store.head(key)).await
    }

    async fn get(&self, key: &Key, range: Range<u64>, etag: &str) -> Result<Vec<Bytes>> {
        self.look(self.store.get(key, range, etag)).await
    }

    async fn list(&self, request: ListRequest<'_>) -> Result<Page> {
        self.look(self.store.list(request)).await
    }

    async fn delete(&self, key: &Key, condition: &Condition) -> Result<()> {
        let request = self.store.delete(key, condition);
        self.change(request, self.timeouts.open, Duration::ZERO)
            .await
    }

    async fn put(
        &self,
        key: &Key,
        body: Bytes,
        attributes: &Attributes,
        condition: &Condition,
    ) -> Result<Object> {
        let request = self.store.put(key, body, attributes, condition);
        self.change(request, self.timeouts.close, Duration::ZERO)
            .await
    }

    async fn create_upload(&self, key: &Key, attributes: &Attributes) -> Result<String> {
        self.look(self.store.create_upload(key, attributes)).await
    }

    async fn upload_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        body: Bytes,
    ) -> Result<Part> {
        let request = self.store.upload_part(key, upload_id, number, body);
        self.change(request, self.timeouts.close, Duration::ZERO)
            .await
    }

    async fn complete(
        &self,
        key: &Key,
        upload_id: &str,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Object> {
        let request = self.store.complete(key, upload_id, parts, condition);
        let in_advance = TIME_PER_PART * parts.len() as u32;
        self.change(request, self.timeouts.close, in_advance).await
    }

    async fn abort(&self, key: &Key, upload_id: &str) -> Result<()> {
        self.look(self.store.abort(key, upload_id)).await
    }

    async fn open(&self, key: &Key, limit: u64) -> Result<(Object, Bytes)> {
        self.look(self.store.open(key, limit)).await
    }

    async fn copy(&self, from: CopySource<'_>, to: &Key, condition: &Condition) -> Result<Copied> {
        let in_advance = copy_time(from.version.size);
        let request = self.store.copy(from, to, condition);
        self.change(request, self.timeouts.close, in_advance).await
    }

    async fn copy_part(
        &self,
        key: &Key,
        upload_id: &str,
        number: u32,
        from: PartSource<'_>,
    ) -> Result<Part> {
        let in_advance = copy_time(from.range.end - from.range.start);
        let request = self.store.copy_part(key, upload_id, number, from);
        self.change(request, self.timeouts.close, in_advance).await
    }

    async fn rename(
        &self,
        from: &Key,
        version: &Object,
        to: &Key,
        condition: &Condition,
    ) -> Result<Object> {
        let in_advance = copy_time(version.size);
        let request = self.store.rename(from, version, to, condition);
        self.change(request, self.timeouts.close, in_advance).await
    }

    async fn incomplete_uploads(
        &self,
        prefix: &Key,
        before: SystemTime,
    ) -> Result<Vec<IncompleteUpload>> {
        self.look(self.store.incomplete_uploads(prefix, before))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::time::sleep;

    const TIMEOUT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn the_time_counts_from_the_last_sign_of_life() {
        let started = Instant::now();
        let hangs = wait(pending::<()>(), TIMEOUT, Duration::ZERO).await;
        assert_eq!((hangs, started.elapsed()), (None, TIMEOUT));

        let slow = async {
            for _ in 0..10 {
                sleep(TIMEOUT - Duration::from_secs(1)).await;
                SignsOfLife::current().give();
            }
            "done"
        };
        assert_eq!(wait(slow, TIMEOUT, Duration::ZERO).await, Some("done"));

        let started = Instant::now();
        let stops = async {
            let signs = SignsOfLife::current();
            let elsewhere = tokio::spawn(async move {
                sleep(Duration::from_secs(20)).await;
                signs.give();
            });
            elsewhere.await.unwrap();
            pending::<()>().await;
        };
        let stopped = wait(stops, TIMEOUT, Duration::ZERO).await;
        assert_eq!((stopped, started.elapsed().as_secs()), (None, 50));
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_advance_is_not_shortened_by_a_sign() {
        let started = Instant::now();
        let stops = async {
            SignsOfLife::current().give();
            pending::<()>().await;
        };
        let stopped = wait(stops, TIMEOUT, Duration::from_secs(100)).await;
        assert_eq!((stopped, started.elapsed().as_secs()), (None, 130));
    }

    /// A store divides its request into several, each of which has time in advance.
    #[tokio::test(start_paused = true)]
    async fn the_time_of_an_inner_request_is_not_cut_by_the_outer_one() {
        const IN_ADVANCE: Duration = Duration::from_secs(100);
        let started = Instant::now();
        let twice = async {
            for _ in 0..2 {
                let inner = wait(pending::<()>(), TIMEOUT, IN_ADVANCE).await;
                assert_eq!(inner, None);
                SignsOfLife::current().give();
            }
            "done"
        };
        let limit = TIMEOUT + Duration::from_secs(1);
        assert_eq!(wait(twice, limit, Duration::ZERO).await, Some("done"));
        assert_eq!(started.elapsed().as_secs(), 260);
    }
}
