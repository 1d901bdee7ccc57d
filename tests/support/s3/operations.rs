//! The S3 operations on the state, each with the checks that Amazon S3 makes.

use super::BUCKET;
use super::encoding::{crc32, crc64, md5, now, url_encode};
use super::state::{About, Object, Store, Upload};
use bytes::Bytes;
use s3s::access::{S3Access, S3AccessContext};
use s3s::dto::*;
use s3s::{Body, S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use std::collections::BTreeMap;

type In<T> = S3Request<T>;
type Out<T> = S3Result<S3Response<T>>;

/// Replaces the default check, which is that a request is signed, by one that names the bucket too.
pub struct OneBucket;

#[async_trait::async_trait]
impl S3Access for OneBucket {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        refuse!(AccessDenied if cx.credentials().is_none());
        refuse!(NoSuchBucket if cx.s3_path().get_bucket_name().is_some_and(|b| b != BUCKET));
        Ok(())
    }
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn head_bucket(&self, _: In<HeadBucketInput>) -> Out<HeadBucketOutput> {
        ok(dto! { HeadBucketOutput: bucket_region = "us-east-1".to_owned() })
    }

    async fn list_objects_v2(&self, r: In<ListObjectsV2Input>) -> Out<ListObjectsV2Output> {
        ok(self.lock().list(r.input)?)
    }

    async fn head_object(&self, r: In<HeadObjectInput>) -> Out<HeadObjectOutput> {
        let i = r.input;
        let o = self.lock().object(&i.key)?.clone();
        o.check(i.if_match.as_ref(), i.if_none_match.as_ref())?;
        let wants_checksum = i.checksum_mode.is_some();
        ok(dto! { HeadObjectOutput:
            content_length = o.body.len() as i64, accept_ranges = "bytes".to_owned(),
            e_tag = o.e_tag(), last_modified = o.modified,
            checksum_crc64nvme = wants_checksum.then(|| crc64(&o.body)),
            content_type = o.about.content_type, metadata = o.about.metadata
        })
    }

    async fn get_object(&self, r: In<GetObjectInput>) -> Out<GetObjectOutput> {
        let i = r.input;
        let (o, ignores_if_match) = {
            let state = self.lock();
            (state.object(&i.key)?.clone(), state.ignores_if_match)
        };
        let like = i.if_match.as_ref().filter(|_| !ignores_if_match);
        o.check(like, i.if_none_match.as_ref())?;
        let size = o.body.len() as u64;
        let mut body = o.body.clone();
        let mut range = None;
        if let Some(wanted) = i.range {
            let part = wanted.check(size)?;
            refuse!(InvalidRange if part.is_empty());
            body = body.slice(part.start as usize..part.end as usize);
            range = Some(format!("bytes {}-{}/{size}", part.start, part.end - 1));
        }
        ok(dto! { GetObjectOutput:
            content_length = body.len() as i64, accept_ranges = "bytes".to_owned(),
            content_range = range, body = StreamingBlob::from(Body::from(body)),
            e_tag = o.e_tag(), last_modified = o.modified,
            content_type = o.about.content_type, metadata = o.about.metadata
        })
    }

    async fn put_object(&self, r: In<PutObjectInput>) -> Out<PutObjectOutput> {
        let i = r.input;
        let object = Object::new(read(i.body).await?, about(i.content_type, i.metadata));
        let mut state = self.lock();
        state.may_write(&i.key, i.if_match.as_ref(), i.if_none_match.as_ref())?;
        let e_tag = state.insert(i.key, object);
        ok(dto! { PutObjectOutput: e_tag = e_tag })
    }

    async fn delete_object(&self, r: In<DeleteObjectInput>) -> Out<DeleteObjectOutput> {
        let i = r.input;
        let mut state = self.lock();
        state.may_write(&i.key, i.if_match.as_ref(), None)?;
        state.objects.remove(&i.key);
        ok(DeleteObjectOutput::default())
    }

    async fn delete_objects(&self, r: In<DeleteObjectsInput>) -> Out<DeleteObjectsOutput> {
        let Delete { objects, quiet } = r.input.delete;
        let mut state = self.lock();
        refuse!(MalformedXML if objects.is_empty() || objects.len() > 1000);
        let mut deleted = Vec::new();
        for object in objects {
            state.objects.remove(&object.key);
            deleted.push(dto! { DeletedObject: key = object.key });
        }
        ok(dto! { DeleteObjectsOutput: deleted = Some(deleted).filter(|_| quiet != Some(true)) })
    }

    async fn copy_object(&self, r: In<CopyObjectInput>) -> Out<CopyObjectOutput> {
        // S3 has had conditions on a copy's target since October 2025, but s3s does not parse them.
        let header = |name| r.headers.get(name)?.to_str().ok()?.parse().ok();
        let conditions: [Option<_>; 2] = ["if-match", "if-none-match"].map(header);
        let i = r.input;
        let (limit, source) = {
            let state = self.lock();
            let like = i.copy_source_if_match.as_ref();
            (state.copy_limit, state.source(&i.copy_source, like)?)
        };
        refuse!(InvalidRequest if source.body.len() as u64 > limit);
        let directive = i.metadata_directive;
        let replace = directive.is_some_and(|d| d.as_str() == "REPLACE");
        let itself = matches!(&i.copy_source, CopySource::Bucket { key, .. } if **key == *i.key);
        refuse!(InvalidRequest if itself && !replace && i.storage_class.is_none());
        let described = match replace {
            true => about(i.content_type, i.metadata),
            false => source.about,
        };
        // The ETag of the copy is a plain MD5, even if the source was uploaded in parts.
        let object = Object::new(source.body, described);
        let last_modified = object.modified.clone();
        let mut state = self.lock();
        state.may_write(&i.key, conditions[0].as_ref(), conditions[1].as_ref())?;
        let e_tag = state.insert(i.key, object);
        let result = dto! { CopyObjectResult: e_tag = e_tag, last_modified = last_modified };
        ok(dto! { CopyObjectOutput: copy_object_result = result })
    }

    async fn create_multipart_upload(
        &self,
        r: In<CreateMultipartUploadInput>,
    ) -> Out<CreateMultipartUploadOutput> {
        let i = r.input;
        let mut state = self.lock();
        state.uploads_ever += 1;
        let id = format!("upload-{:06}", state.uploads_ever);
        let upload = Upload {
            key: i.key.clone(),
            started: now(),
            about: about(i.content_type, i.metadata),
            parts: BTreeMap::new(),
            checksums: i.checksum_algorithm.map(|_| BTreeMap::new()),
            initiator: "us".to_owned(),
        };
        state.uploads.insert(id.clone(), upload);
        ok(dto! { CreateMultipartUploadOutput: bucket = i.bucket, key = i.key, upload_id = id })
    }

    async fn upload_part(&self, r: In<UploadPartInput>) -> Out<UploadPartOutput> {
        let i = r.input;
        let part = Object::new(read(i.body).await?, About::default());
        let e_tag = part.e_tag();
        let mut state = self.lock();
        let checksums = &mut state.upload(&i.upload_id, &i.key)?.checksums;
        // "Checksum Type mismatch occurred, expected checksum Type: null, actual checksum Type:
        // crc32"
        refuse!(InvalidRequest if checksums.is_some() != i.checksum_crc32.is_some());
        if let Some((checksums, sum)) = checksums.as_mut().zip(i.checksum_crc32.clone()) {
            refuse!(BadDigest if sum != crc32(&part.body));
            checksums.insert(i.part_number, sum);
        }
        let parts = state.parts(&i.upload_id, &i.key, i.part_number)?;
        parts.insert(i.part_number, part);
        ok(dto! { UploadPartOutput: e_tag = e_tag, checksum_crc32 = i.checksum_crc32 })
    }

    async fn upload_part_copy(&self, r: In<UploadPartCopyInput>) -> Out<UploadPartCopyOutput> {
        let i = r.input;
        let mut state = self.lock();
        let source = state.source(&i.copy_source, i.copy_source_if_match.as_ref())?;
        let mut body = source.body;
        if let Some(range) = i.copy_source_range {
            let (first, last) = match Range::parse(&range) {
                Ok(Range::Int { first, last }) => (first, last.unwrap_or(u64::MAX)),
                _ => return Err(s3_error!(InvalidArgument)),
            };
            refuse!(InvalidArgument if last >= body.len() as u64);
            // S3 copies a range only out of an object larger than the smallest part.
            refuse!(InvalidRequest if body.len() <= state.min_part);
            body = body.slice(first as usize..=last as usize);
        }
        let part = Object::new(body, About::default());
        let result = dto! { CopyPartResult:
            e_tag = part.e_tag(), last_modified = part.modified.clone()
        };
        let parts = state.parts(&i.upload_id, &i.key, i.part_number)?;
        parts.insert(i.part_number, part);
        ok(dto! { UploadPartCopyOutput: copy_part_result = result })
    }

    async fn complete_multipart_upload(
        &self,
        r: In<CompleteMultipartUploadInput>,
    ) -> Out<CompleteMultipartUploadOutput> {
        let i = r.input;
        let mut state = self.lock();
        let min_part = state.min_part;
        let upload = state.upload(&i.upload_id, &i.key)?;
        let listed = i.multipart_upload.and_then(|m| m.parts).unwrap_or_default();
        refuse!(MalformedXML if listed.is_empty());
        refuse!(InvalidPartOrder if !listed.is_sorted_by(|a, b| a.part_number < b.part_number));
        let mut parts = Vec::new();
        let mut digests = Vec::new();
        for l in &listed {
            let part = l.part_number.and_then(|n| upload.parts.get(&n));
            let part = part.filter(|p| l.e_tag.as_ref().is_some_and(|e| e.value() == p.etag));
            let part = part.ok_or(s3_error!(InvalidPart))?;
            // "The complete request must include the checksum for each part."
            let sums = upload.checksums.as_ref().zip(l.part_number);
            refuse!(InvalidRequest if sums.is_some_and(|(sums, n)| sums.get(&n) != l.checksum_crc32.as_ref()));
            parts.push(part.body.clone());
            let digest = u128::from_str_radix(&part.etag, 16).expect("an MD5");
            digests.extend(digest.to_be_bytes());
        }
        refuse!(EntityTooSmall if parts[..parts.len() - 1].iter().any(|p| p.len() < min_part));
        let size: usize = parts.iter().map(Bytes::len).sum();
        refuse!(InvalidRequest if i.mpu_object_size.is_some_and(|told| told != size as i64));
        let about = upload.about.clone();
        state.may_write(&i.key, i.if_match.as_ref(), i.if_none_match.as_ref())?;
        state.uploads.remove(&i.upload_id);
        let mut object = Object::new(Bytes::new(), about);
        object.body = parts.concat().into();
        object.etag = format!("{}-{}", md5(&digests), parts.len());
        let e_tag = state.insert(i.key.clone(), object);
        ok(dto! { CompleteMultipartUploadOutput: bucket = i.bucket, key = i.key, e_tag = e_tag })
    }

    async fn abort_multipart_upload(
        &self,
        r: In<AbortMultipartUploadInput>,
    ) -> Out<AbortMultipartUploadOutput> {
        let i = r.input;
        let mut state = self.lock();
        state.upload(&i.upload_id, &i.key)?;
        state.uploads.remove(&i.upload_id);
        ok(AbortMultipartUploadOutput::default())
    }

    async fn list_multipart_uploads(
        &self,
        r: In<ListMultipartUploadsInput>,
    ) -> Out<ListMultipartUploadsOutput> {
        let i = r.input;
        let state = self.lock();
        let url = i.encoding_type.is_some();
        let prefix = i.prefix.unwrap_or_default();
        let mut uploads = Vec::new();
        for (id, u) in &state.uploads {
            if u.key.starts_with(&prefix) {
                uploads.push(dto! { MultipartUpload:
                    key = if url { url_encode(&u.key) } else { u.key.clone() },
                    upload_id = id.clone(), initiated = u.started.clone(),
                    initiator = dto! { Initiator: id = u.initiator.clone() }
                });
            }
        }
        uploads.sort_by(|a, b| a.key.cmp(&b.key));
        ok(dto! { ListMultipartUploadsOutput:
            bucket = i.bucket, is_truncated = false, uploads = uploads,
            encoding_type = i.encoding_type
        })
    }

    async fn get_bucket_lifecycle_configuration(
        &self,
        _: In<GetBucketLifecycleConfigurationInput>,
    ) -> Out<GetBucketLifecycleConfigurationOutput> {
        let rule = LifecycleRule {
            abort_incomplete_multipart_upload: Some(AbortIncompleteMultipartUpload {
                days_after_initiation: Some(2),
            }),
            expiration: None,
            filter: None,
            id: None,
            noncurrent_version_expiration: None,
            noncurrent_version_transitions: None,
            prefix: None,
            status: ExpirationStatus::from_static(ExpirationStatus::ENABLED),
            transitions: None,
        };
        ok(dto! { GetBucketLifecycleConfigurationOutput: rules = vec![rule] })
    }

    async fn list_parts(&self, r: In<ListPartsInput>) -> Out<ListPartsOutput> {
        let i = r.input;
        let mut state = self.lock();
        let from = i.part_number_marker.unwrap_or(0) + 1;
        let max = i.max_parts.unwrap_or(1000).clamp(0, 1000);
        let mut rest = state.upload(&i.upload_id, &i.key)?.parts.range(from..);
        let mut parts = Vec::new();
        for (number, part) in rest.by_ref().take(max as usize) {
            parts.push(dto! { Part:
                part_number = *number, size = part.body.len() as i64, e_tag = part.e_tag(),
                last_modified = part.modified.clone()
            });
        }
        ok(dto! { ListPartsOutput:
            bucket = i.bucket, key = i.key, upload_id = i.upload_id, max_parts = max,
            next_part_number_marker = parts.last().and_then(|p| p.part_number),
            is_truncated = rest.next().is_some(), parts = parts
        })
    }
}

fn about(content_type: Option<ContentType>, metadata: Option<Metadata>) -> About {
    About {
        content_type,
        metadata,
    }
}

fn ok<T>(output: T) -> Out<T> {
    Ok(S3Response::new(output))
}

/// The whole of a body, or an error if the client gave up or its signature does not match.
async fn read(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let mut body = body.map(Body::from).unwrap_or_default();
    let read = body.store_all_limited(usize::MAX).await;
    read.map_err(|e| S3Error::with_source(S3ErrorCode::IncompleteBody, e))
}
