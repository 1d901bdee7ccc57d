<?php
// The errand of tests/interop.rs with phpseclib 2.

require 'phpseclib/autoload.php';

use phpseclib\Crypt\RSA;
use phpseclib\Net\SFTP;

[, $port, $knownHosts, $key, $password] = $argv;
set_error_handler(function ($severity, $message, $file, $line) {
    // Deprecations of the library's own.
    if ($severity & (E_DEPRECATED | E_USER_DEPRECATED)) {
        return true;
    }
    // phpseclib tells what a server refused by a notice.
    if (strpos($file, '/usr/share/php/') === 0 && ($severity & E_USER_NOTICE)) {
        return true;
    }
    throw new ErrorException($message, 0, $severity, $file, $line);
});

function check($holds, $what)
{
    if (!$holds) {
        throw new Exception($what);
    }
}

function login($proof)
{
    global $port, $knownHosts;
    $sftp = new SFTP('127.0.0.1', (int) $port, 60);
    // An algorithm and a key: an RSA key has several algorithms.
    $hostKey = $sftp->getServerPublicHostKey();
    check($hostKey !== false, 'no connection: ' . implode('; ', $sftp->getErrors()));
    $hostKey = explode(' ', $hostKey)[1];
    check(strpos(file_get_contents($knownHosts), " $hostKey") !== false, 'the host key is not known');
    check($sftp->login('alice', $proof), 'the login was refused: ' . implode('; ', $sftp->getErrors()));
    return $sftp;
}

// The call answered false, for that reason.
function fails($sftp, $result, $reason)
{
    check($result === false, "should have failed: $reason");
    $error = $sftp->getLastSFTPError();
    check(strpos($error, $reason) === 0, "'$error' instead of $reason");
}

function names($sftp, $directory)
{
    $names = array_values(array_diff($sftp->nlist($directory), ['.', '..']));
    sort($names);
    return $names;
}

function copyUp($sftp, $local, $remote)
{
    check($sftp->mkdir($remote), $remote);
    foreach (array_diff(scandir($local), ['.', '..']) as $name) {
        if (is_dir("$local/$name")) {
            copyUp($sftp, "$local/$name", "$remote/$name");
        } else {
            check($sftp->put("$remote/$name", "$local/$name", SFTP::SOURCE_LOCAL_FILE), $name);
        }
    }
}

function copyDown($sftp, $remote, $local)
{
    mkdir($local);
    $names = array_values(array_diff(scandir(str_replace('down', 'tree', $local)), ['.', '..']));
    sort($names);
    check(names($sftp, $remote) === $names, "$remote holds " . implode(' ', names($sftp, $remote)));
    foreach ($names as $name) {
        if ($sftp->is_dir("$remote/$name")) {
            copyDown($sftp, "$remote/$name", "$local/$name");
        } else {
            check($sftp->get("$remote/$name", "$local/$name"), $name);
            check($sftp->size("$remote/$name") === filesize("$local/$name"), $name);
        }
    }
}

$sftp = login($password);
check(names($sftp, '/') === [], 'an empty home');
$sftp->disconnect();

// This version reads RSA keys only.
$rsa = new RSA();
check($rsa->loadKey(file_get_contents($key)), 'the key is not readable');
$sftp = login($rsa);
$sftp->disableStatCache();
copyUp($sftp, 'tree', 'up');
copyDown($sftp, 'up', 'down');

check($sftp->rename('up/hello.txt', 'up/renamed'), 'rename');
fails($sftp, $sftp->rename('up/renamed', 'up/empty'), 'NET_SFTP_STATUS_FAILURE: Failure');
fails($sftp, $sftp->rmdir('up/sub'), 'NET_SFTP_STATUS_FAILURE: Failure');
fails($sftp, $sftp->mkdir('up/sub'), 'NET_SFTP_STATUS_FAILURE: Failure');
fails($sftp, $sftp->stat('up/missing'), 'NET_SFTP_STATUS_NO_SUCH_FILE: No such file');
fails($sftp, $sftp->get('up/missing'), 'NET_SFTP_STATUS_NO_SUCH_FILE: No such file');
fails($sftp, $sftp->delete('up/missing', false), 'NET_SFTP_STATUS_NO_SUCH_FILE: No such file');
fails($sftp, $sftp->nlist('up/missing'), 'NET_SFTP_STATUS_NO_SUCH_FILE: No such file');
fails($sftp, $sftp->rename('up/missing', 'up/other'), 'NET_SFTP_STATUS_NO_SUCH_FILE: No such file');
check($sftp->mkdir('up/hollow') && $sftp->rmdir('up/hollow'), 'an empty directory');
check($sftp->delete('up/sub/one'), 'delete');

check($sftp->put('up/notes', "one\n"), 'put');
check($sftp->put('up/notes', "two\n", SFTP::SOURCE_STRING | SFTP::RESUME), 'append');
check($sftp->get('up/notes') === "one\ntwo\n", 'what was appended to');

check($sftp->put('up/resumed', 'begun', SFTP::SOURCE_LOCAL_FILE), 'the beginning');
$resume = SFTP::SOURCE_LOCAL_FILE | SFTP::RESUME;
check($sftp->put('up/resumed', 'tree/large.bin', $resume, -1, filesize('begun')), 'the rest');
