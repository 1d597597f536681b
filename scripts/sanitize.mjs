// Runs the tests on an addon with the address and undefined-behaviour sanitizers, built in build-sanitize/. Arguments go to tap.

import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { copySources, gypEnvironment, missingTools, root } from './toolchain.mjs';

if (process.platform !== 'linux') {
  console.error(`sanitize: the addon is for Linux, and this is ${process.platform}`);
  process.exit(1);
}
const missing = missingTools();
if (missing.length > 0) {
  console.error(`sanitize: ${missing.join(' and ')} not found: sudo apt install g++ make python3`);
  process.exit(1);
}

const directory = join(root, 'build-sanitize');
copySources(directory);
const gyp = createRequire(import.meta.url).resolve('node-gyp/bin/node-gyp.js');
const flags = '-fsanitize=address,undefined -fno-sanitize-recover=undefined';
const build = spawnSync(process.execPath, [gyp, 'rebuild'], {
  cwd: directory,
  env: { ...gypEnvironment(), GYP_DEFINES: `sanitize="${flags}"` },
  encoding: 'utf8',
  maxBuffer: 1 << 28,
});
if (build.status !== 0) {
  process.stderr.write(`${build.stdout ?? ''}${build.stderr ?? ''}`);
  console.error('sanitize: the build failed, see above');
  process.exit(1);
}

// The sanitizer keeps freed memory and shadows all of it, so a test of how much is left would measure the sanitizer.
const given = process.argv.slice(2);
const tests = given.length > 0 ? given : ['--exclude=dist/test/lifecycle/load.test.js'];
const compiler = process.env.CXX ?? 'g++';
const library = (name) => spawnSync(compiler, [`-print-file-name=${name}`], { encoding: 'utf8' }).stdout.trim();
const { status, signal } = spawnSync(process.execPath, [join(root, 'scripts/test.mjs'), ...tests], {
  cwd: root,
  env: {
    ...process.env,
    GUEST_MEMFD_PREBUILD: directory,
    // Node itself has no sanitizer, so the runtimes have to be there before everything else.
    LD_PRELOAD: [library('libasan.so'), library('libubsan.so')].join(' '),
    // Leaks are not looked for: V8 and Node keep memory until the process ends, and LeakSanitizer would report that as ours.
    ASAN_OPTIONS: 'detect_leaks=0:halt_on_error=1',
    UBSAN_OPTIONS: 'halt_on_error=1:print_stacktrace=1',
  },
  stdio: 'inherit',
});
if (signal !== null) console.error(`sanitize: the tests ended by ${signal}`);
process.exit(status ?? 1);
