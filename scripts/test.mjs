// `npm test`: builds what is missing, runs the tests, and says last what ran where and what could not. Arguments go to tap:
//   npm test -- dist/test/ranges.test.js

import { spawnSync } from 'node:child_process';
import { accessSync, constants, existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const require = createRequire(import.meta.url);
const results = join(root, '.tap/results.tap');
const conformance = join(root, '.tap/conformance');
const FAILURES_SHOWN = 40;

build('--typescript');
build('--addon');
removeStale(join(root, 'dist/test'));
rmSync(results, { force: true });
rmSync(conformance, { recursive: true, force: true });
mkdirSync(dirname(results), { recursive: true });

const status = runTap(process.argv.slice(2));
const { readTap } = await import('../dist/test/tap_output.js');
const { published, summary } = await import('../dist/test/conformance/tally.js');
const outcome = readTap(existsSync(results) ? readFileSync(results, 'utf8') : '');
printResults(outcome);
printConformance();
finish(status, outcome);

function build(part) {
  const { status } = spawnSync(process.execPath, [join(root, 'scripts/build.mjs'), part], { stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}

/** A compiled test whose source is gone would still run. */
function removeStale(folder) {
  for (const name of readdirSync(folder, { recursive: true })) {
    if (!name.endsWith('.js')) continue;
    const source = join(root, relative(join(root, 'dist'), join(folder, name.replace(/\.js$/, '.ts'))));
    if (!existsSync(source)) rmSync(join(folder, name));
  }
}

/** Quiet: 6000 assertions that hold are not worth drawing. What failed is printed from the results. */
function runTap(args) {
  const { bin } = require('tap/package.json');
  const tap = join(dirname(require.resolve('tap/package.json')), bin.tap);
  const options = [`--output-file=${results}`, '--reporter=silent'];
  const env = { ...process.env, TAP_RCFILE: join(root, '.taprc') };
  return spawnSync(process.execPath, [tap, ...options, ...args], { cwd: root, stdio: 'inherit', env }).status ?? 1;
}

/** Each file's result, and every failed assertion, with what tap knows of it. */
function printResults({ failures, files }) {
  for (const { title, diagnosis } of failures.slice(0, FAILURES_SHOWN)) console.log(`\nnot ok: ${title}\n${diagnosis}`);
  if (failures.length > FAILURES_SHOWN)
    console.log(`\n… and ${failures.length - FAILURES_SHOWN} more in ${relative(root, results)}`);
  console.log(`\n${files.join('\n')}`);
}

/** A line for each kernel the conformance cases ran on. */
function printConformance() {
  console.log('');
  for (const family of ['linux', 'software']) {
    const { tallies, reason } = published(family) ?? { tallies: [] };
    if (reason) console.log(`${family}: no case could run: ${reason.split('\n')[0]}`);
    for (const tally of tallies) console.log(summary(tally));
  }
}

/** Where nothing may be skipped: /dev/kvm opens and the addon is there. */
function isKvmHost() {
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
  } catch {
    return false;
  }
  return existsSync(join(root, 'build/Release/guest_memfd.node'));
}

function finish(status, { passed, failed, skipped }) {
  const problems = [];
  if (passed + failed === 0) problems.push('no test ran');
  if (skipped > 0 && isKvmHost()) problems.push(`${skipped} skipped, although this host has KVM`);
  if (status !== 0 && failed === 0 && problems.length === 0) problems.push(`tap ended with status ${status}`);
  for (const problem of problems) console.log(`FAIL: ${problem}`);
  console.log(`${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`);
  process.exitCode = status !== 0 || failed > 0 || problems.length > 0 ? 1 : 0;
}
