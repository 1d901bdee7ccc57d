// The errand of tests/interop.rs with ssh2.
'use strict';

const assert = require('node:assert');
const fs = require('node:fs');
const path = require('node:path');
const { promisify } = require('node:util');
const { connect } = require('./connection');

/** SSH_FX_NO_SUCH_FILE and SSH_FX_FAILURE. */
const NO_SUCH_FILE = 2;
const FAILURE = 4;

async function main() {
  const withPassword = await connect({ password: true });
  assert.deepStrictEqual(await promisify(withPassword.sftp.readdir).call(withPassword.sftp, '/'), []);
  withPassword.client.end();

  const { client, sftp } = await connect({ key: true });
  const call = (name, ...args) => promisify(sftp[name]).call(sftp, ...args);
  const fails = (code, words, name, ...args) =>
    assert.rejects(call(name, ...args), (error) => {
      assert.strictEqual(error.code, code, error.message);
      assert.match(error.message, words);
      return true;
    });

  await call('mkdir', 'up');
  for (const entry of fs.readdirSync('tree', { withFileTypes: true, recursive: true })) {
    const local = path.join(entry.path, entry.name);
    const remote = local.replace('tree', 'up');
    if (entry.isDirectory()) {
      await call('mkdir', remote);
      continue;
    }
    await call('fastPut', local, remote);
    const attributes = await call('stat', remote);
    assert.strictEqual(attributes.size, fs.statSync(local).size, remote);
    assert(attributes.isFile());
  }

  fs.mkdirSync('down');
  const directories = [''];
  while (directories.length > 0) {
    const directory = directories.pop();
    const entries = await call('readdir', path.join('up', directory));
    const names = entries.map((entry) => entry.filename).sort();
    assert.deepStrictEqual(names, fs.readdirSync(path.join('tree', directory)).sort());
    for (const entry of entries) {
      const name = path.join(directory, entry.filename);
      if (entry.attrs.isDirectory()) {
        fs.mkdirSync(path.join('down', name));
        directories.push(name);
      } else {
        await call('fastGet', path.join('up', name), path.join('down', name));
      }
    }
  }

  await call('rename', 'up/hello.txt', 'up/renamed');
  await fails(FAILURE, /Failure/, 'rename', 'up/renamed', 'up/empty');
  await fails(FAILURE, /Failure/, 'rmdir', 'up/sub');
  await fails(FAILURE, /Failure/, 'mkdir', 'up/sub');
  for (const [name, ...args] of [['stat'], ['open', 'r'], ['unlink'], ['readdir'], ['rename', 'up/other']]) {
    await fails(NO_SUCH_FILE, /No such file/, name, 'up/missing', ...args);
  }
  await call('mkdir', 'up/hollow');
  await call('rmdir', 'up/hollow');
  await call('unlink', 'up/sub/one');

  await call('writeFile', 'up/notes', 'one\n');
  await call('appendFile', 'up/notes', 'two\n');
  assert.strictEqual(String(await call('readFile', 'up/notes')), 'one\ntwo\n');

  await call('fastPut', 'begun', 'up/resumed');
  const start = fs.statSync('begun').size;
  const rest = fs.createReadStream('tree/large.bin', { start });
  const target = sftp.createWriteStream('up/resumed', { flags: 'r+', start });
  await require('node:stream/promises').pipeline(rest, target);
  client.end();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
