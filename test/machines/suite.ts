import { appendFileSync, mkdirSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { published, summary } from '../conformance/tally.ts';
import { readTap } from '../tap_output.ts';
import type { Machine } from './machines.ts';
import { duration } from './progress.ts';
import { clone } from './root.ts';
import { consoleOf, type RunOptions, resultsOf, runInMachine } from './run.ts';

/** These ask no kernel, or only print what others test: the host has run them. The rest leaves its software kernels out, see test/pace.ts. */
const leftOut = [
  ...['conformance/software', 'ranges', 'cli', 'experiments', 'package', 'conversion_in_place', 'store_files'],
  ...[
    'grant_ring',
    'guest_seal',
    'in_place_protocol',
    'large_folios',
    'memslot_lock',
    'special_mapping',
    'write_population',
  ].map((name) => `proposals/${name}`),
].map((name) => `dist/test/${name}.test.js`);
/** Long ones first: two run at a time. */
const first = [
  ...['lifecycle.test', 'conformance/linux', 'vcpu_worker', 'linux_vcpu', 'hostile', 'lifecycle/load', 'pager'],
  ...['migration', 'hand_over', 'agent', 'store.test'],
];
const FAILURES_SHOWN = 40;
/** What Linux says of a program or of itself that fell over. */
const COMPLAINT = /unhandled|segfault|Oops|BUG:|WARNING:|Out of memory|oom-kill|Call trace|Unable to handle|rcu: INFO/;

/** Runs the tests in a machine, and says how they went. Returns what failed, nothing if all held and the machine said so itself. */
export async function runSuite(machine: Machine, only: readonly string[], options: RunOptions): Promise<string[]> {
  const results = resultsOf(machine);
  rmSync(results, { recursive: true, force: true });
  mkdirSync(results, { recursive: true });
  const wanted = only.length > 0 ? only : (machine.files ?? ['']);
  const files = testFiles().filter((file) => wanted.some((text) => file.includes(text)));
  console.log(`\n${machine.name}: ${machine.what}, ${files.length} test files`);

  const output = join(results, 'results.tap');
  let tap = '';
  const onOutput = (text: string): void => {
    tap += text;
    appendFileSync(output, text);
    for (const [line] of text.matchAll(/^(not )?ok \d+ - dist\/.*$/gm))
      console.log(`  ${line.replace(/ok \d+ - /, 'ok: ').replace(/# time=(.*)/, '($1)')}`);
  };
  const { status, problem, boot, total } = await runInMachine(machine, ['dist/test/machines/inside.js', ...files], {
    ...options,
    onOutput,
    env: { GUEST_MEMFD_TEST_BACKENDS: 'kvm' },
  });

  const { passed, failed, skipped, failures, files: ended } = readTap(tap);
  const problems = [
    ...failures.slice(0, FAILURES_SHOWN).map(({ title, diagnosis }) => `not ok: ${title}\n${diagnosis}`),
    ...(problem ? [`the machine failed: ${problem}`] : []),
    ...(problem === undefined && status !== 0 && failed === 0 ? [`the tests ended with status ${status}`] : []),
    ...files.filter((file) => !ended.some((line) => line.includes(file))).map((file) => `${file} did not finish`),
    ...(skipped > 0 ? [`${skipped} skipped`] : []),
    ...(passed === 0 ? ['no test ran'] : []),
  ];
  for (const tally of published('linux', results)?.tallies ?? []) console.log(summary(tally));
  const times = `booted in ${duration(boot)}, all in ${duration(total)}`;
  console.log(`${machine.name}: ${passed} passed, ${failed} failed, ${skipped} skipped (${times})`);
  if (problems.length === 0) return [];
  const complaints = (options.keep ? '' : readFileSync(consoleOf(machine), 'utf8'))
    .split('\n')
    .filter((line) => COMPLAINT.test(line));
  return [...problems, ...complaints.slice(-FAILURES_SHOWN)].map((text) => `${machine.name}: ${text}`);
}

function testFiles(): string[] {
  const names = readdirSync(join(clone, 'dist/test'), { recursive: true, encoding: 'utf8' });
  const rank = (file: string) =>
    (first.findIndex((part) => file.includes(part)) + first.length + 1) % (first.length + 1);
  return names
    .filter((name) => name.endsWith('.test.js'))
    .map((name) => `dist/test/${name}`)
    .filter((file) => !leftOut.includes(file))
    .sort((a, b) => rank(a) - rank(b));
}
