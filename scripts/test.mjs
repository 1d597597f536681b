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
printResults();
const counts = readCounts();
printConformance();
finish(status, counts);

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

/** Each file's result, and every failed assertion under its subtests' names, with what tap knows of it. */
function printResults() {
  const lines = existsSync(results) ? readFileSync(results, 'utf8').split('\n') : [];
  const [open, files] = [[], []];
  let failures = 0;
  lines.forEach((line, index) => {
    const [, indent = '', subtest, not, title = ''] =
      /^( *)(?:# Subtest: (.*)|(not )?ok \d+(?: - (.*))?)$/.exec(line) ?? [];
    if (subtest !== undefined) {
      open.push({ indent, subtest, failures: 0 });
    } else if (/^ *(not )?ok \d/.test(line)) {
      const own = open.at(-1);
      const ends = own?.indent === indent && title.startsWith(own.subtest);
      if (ends) open.pop();
      if (not && !(ends && own.failures > 0)) {
        for (const each of open) each.failures++;
        if (++failures > FAILURES_SHOWN) return;
        console.log(`\nnot ok: ${[...open.map((each) => each.subtest), title].join(' > ')}`);
        console.log(diagnosis(lines, index + 1, indent.length + 2));
      }
      if (indent === '' && title) files.push(`${not ? 'not ok' : 'ok'}: ${title.replace(/# time=(.*)/, '($1)')}`);
    }
  });
  if (failures > FAILURES_SHOWN) console.log(`\n… and ${failures - FAILURES_SHOWN} more in ${relative(root, results)}`);
  console.log(`\n${files.join('\n')}`);
}

/** The YAML block behind a line. */
function diagnosis(lines, start, indent) {
  if (lines[start]?.trim() !== '---') return '';
  const end = lines.findIndex((line, index) => index > start && line.slice(indent) === '...');
  return lines
    .slice(start + 1, end)
    .map((line) => `  ${line.slice(indent)}`)
    .join('\n');
}

/** The assertions of all files, as tap counts them at the end of its output. */
function readCounts() {
  const text = existsSync(results) ? readFileSync(results, 'utf8') : '';
  const summary = [...text.matchAll(/^# (\{ total: .*\})$/gm)].at(-1)?.[1] ?? '';
  const count = (name) => Number(new RegExp(`\\b${name}: (\\d+)`).exec(summary)?.[1] ?? 0);
  return { passed: count('pass'), failed: count('fail'), skipped: count('skip') + count('todo') };
}

/** A line for each kernel the conformance cases ran on. */
function printConformance() {
  const families = existsSync(conformance) ? readdirSync(conformance).sort() : [];
  console.log('');
  for (const file of families) {
    const { tallies, reason } = JSON.parse(readFileSync(join(conformance, file), 'utf8'));
    if (reason) console.log(`${file.replace('.json', '')}: no case could run: ${reason.split('\n')[0]}`);
    for (const { kernel, agree, disagree, notApplicable } of tallies) {
      const reasons = group(notApplicable);
      const left = reasons.reduce((sum, [, count]) => sum + count, 0);
      const disagreeing = disagree > 0 ? `, ${disagree} DISAGREE` : '';
      const why = left > 0 ? ` (${reasons.map(([why, count]) => `${why}: ${count}`).join('; ')})` : '';
      console.log(`${kernel}: ${agree} cases agree${disagreeing}, ${left} not applicable${why}`);
    }
  }
}

/** The most frequent reason first; what belongs to other versions is one reason. */
function group(notApplicable) {
  const groups = new Map();
  for (const [missing, count] of Object.entries(notApplicable)) {
    const reason = missing.replace(/^(not )?older than .*/, 'other versions');
    groups.set(reason, (groups.get(reason) ?? 0) + count);
  }
  return [...groups].sort(([, a], [, b]) => b - a);
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
