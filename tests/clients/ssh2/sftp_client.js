// ssh2-sftp-client: put and get with buffers, streams and files, whole directories, and the rest of its calls.
'use strict';

const assert = require('node:assert');
const fs = require('node:fs');
const Client = require('ssh2-sftp-client');
const { loginOptions } = require('./connection');

async function main() {
  const withPassword = new Client();
  await withPassword.connect(loginOptions({ password: true }));
  assert.deepStrictEqual(await withPassword.list('/'), []);
  await withPassword.end();

  const sftp = new Client();
  await sftp.connect(loginOptions({ key: true }));
  // Otherwise each WRITE of a stream waits 40 ms for the acknowledgement of its first half.
  sftp.client.setNoDelay(true);
  await sftp.uploadDir('tree', 'up');
  await sftp.downloadDir('up', 'down');

  const large = fs.readFileSync('tree/large.bin');
  await sftp.mkdir('put/deep/er', true);
  await sftp.put(large, 'put/buffer');
  await sftp.put(fs.createReadStream('tree/large.bin'), 'put/stream');
  await sftp.put('tree/large.bin', 'put/file');
  await sftp.fastPut('tree/large.bin', 'put/fast');
  assert((await sftp.get('put/fast')).equals(large));
  await sftp.get('put/file', fs.createWriteStream('stream'));
  await sftp.get('put/buffer', 'file');
  await sftp.fastGet('put/stream', 'fast');

  await sftp.append(Buffer.from('end'), 'put/fast');
  assert.strictEqual((await sftp.stat('put/fast')).size, large.length + 3);
  assert.strictEqual(await sftp.exists('put/deep'), 'd');
  assert.strictEqual(await sftp.exists('put/fast'), '-');
  assert.strictEqual(await sftp.exists('put/missing'), false);
  assert.deepStrictEqual(
    (await sftp.list('put')).map((entry) => entry.type + entry.name).sort(),
    ['-buffer', '-fast', '-file', '-stream', 'ddeep'],
  );
  await sftp.rename('put/fast', 'put/moved');
  await assert.rejects(sftp.rename('put/moved', 'put/file'), /Failure/);
  await sftp.posixRename('put/moved', 'put/file');
  for (const [name, ...args] of [['stat', 'missing'], ['delete', 'missing'], ['list', 'missing'], ['get', 'missing']]) {
    await assert.rejects(sftp[name](...args), /No such file/, name);
  }
  await sftp.rcopy('put/buffer', 'put/copied');
  await sftp.delete('put/buffer');
  await sftp.rmdir('put/deep', true);
  await sftp.end();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
