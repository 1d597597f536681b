import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { softwareKernel } from '../../lib/kernel/index.ts';
import { Machine } from '../../lib/kernel/machine.ts';
import { kernelVersions, type ModelOptions } from '../../lib/model_options.ts';
import { sections } from '../conformance/cases/index.ts';
import { Scenario } from '../conformance/scenario.ts';
import { forked, judge, needsOf } from '../conformance/suite.ts';
import { fuzz } from './fuzz.ts';
import { factsOf } from './machine.ts';
import { type Mutant, mutants, named } from './mutant.ts';
import type { Call } from './program.ts';
import { type AnyRule, allRuleLists, replaceRules } from './rules.ts';
import { explainSurvivor } from './survivors.ts';
import { unreachable } from './unreachable.ts';

// `npm run mutants`: models that have one rule wrong. The fuzzer, against the model as it is, a conformance case or a test of a
// proposal has to notice.

/** Programs tried on a mutant, in rounds, the last of which only makes the calls the rule is about: most are noticed in the first. */
const ROUNDS: readonly number[] = [10, 40, 400];
const SEED = 4711;

/** The kernels a mutant plays, until it is noticed: every rule can decide on one of them. */
const models: readonly ModelOptions[] = [
  {},
  { arch: 'aarch64' },
  { arch: 'aarch64', pkvm: true },
  { kernel: '6.18', swProtected: false, tdp: false },
  ...kernelVersions.filter((kernel) => kernel !== '7.3').map((kernel): ModelOptions => ({ kernel })),
  { kernel: '6.8', swProtected: false },
];

/** The calls that meet the rules of a list, and those that make what they are about. */
const about: Readonly<Record<string, readonly Call[]>> = {
  createVm: ['createVm'],
  createGuestMemfd: ['createGuestMemfd', 'createVm'],
  memslot: ['setUserMemoryRegion', 'setUserMemoryRegion2', 'createGuestMemfd', 'close'],
  memoryAttributes: ['setMemoryAttributes'],
  fallocate: ['fallocate', 'createGuestMemfd'],
  vfsFallocate: ['fallocate', 'memfdCreate', 'close'],
  enableCap: ['enableCap', 'createVcpu', 'setUserMemoryRegion'],
  getDirtyLog: ['getDirtyLog', 'setUserMemoryRegion', 'enableCap'],
  clearDirtyLog: ['clearDirtyLog', 'setUserMemoryRegion', 'enableCap'],
  mmap: ['mmap', 'createGuestMemfd', 'memfdCreate', 'createVcpu', 'fcntl'],
};

/** The tests of what only a proposal has, by the list its rules are in. */
const proposals: Readonly<Record<string, readonly string[]>> = {
  createGuestMemfd: ['large_folios'],
  fallocate: ['large_folios'],
  mmap: ['guest_seal', '../host_memory'],
  conversion: ['in_place_conversion', 'in_place_protocol', 'large_folios'],
  grantRing: ['grant_ring'],
  link: ['../hand_over'],
  lockAction: ['memslot_lock'],
  lock: ['memslot_lock', '../memslot_lock'],
  lockBound: ['memslot_lock', '../memslot_lock'],
  unlock: ['memslot_lock', '../memslot_lock'],
  lockedSlot: ['memslot_lock', '../memslot_lock'],
  lockedRange: ['memslot_lock', '../memslot_lock'],
  guestSeal: ['guest_seal'],
  guestFile: ['guest_seal'],
  guestFileFallocate: ['guest_seal'],
  transfer: ['write_population'],
};

/** What noticed the mutant, or null. */
async function noticed(mutant: Mutant, hopeless: boolean): Promise<string | null> {
  const list = allRuleLists[mutant.list] as readonly AnyRule[];
  const originals = [...list];
  const asMutant = <T>(call: () => T): T => {
    replaceRules(list, mutant.rules);
    try {
      return call();
    } finally {
      replaceRules(list, originals);
    }
  };
  const sensible = about[mutant.list]
    ? models.filter((model) => !unreachable(model, mutant.list, mutant.rule.name, mutant.index))
    : [];
  for (const [round, runs] of ROUNDS.entries()) {
    for (const model of sensible) {
      const pair = { model: () => softwareKernel(model), other: () => softwareKernel(model), facts: factsOf(model) };
      const calls = round === ROUNDS.length - 1 ? about[mutant.list] : undefined;
      if (fuzz({ ...pair, inOther: asMutant }, { runs, seed: SEED + round, calls, shrink: false })) return 'the fuzzer';
    }
    if (round > 0) continue;
    if (hopeless) return null;
    replaceRules(list, mutant.rules);
    const failed = await failingCase(new Set([...sensible, ...models]));
    replaceRules(list, originals);
    if (failed) return `case ${failed}`;
  }
  return failingTest(mutant);
}

/** The first file of tests that fails in a process whose software kernels are the mutant. */
function failingTest(mutant: Mutant): string | null {
  const here = (path: string) => fileURLToPath(new URL(path, import.meta.url));
  for (const file of proposals[mutant.list] ?? []) {
    const { status } = spawnSync(
      process.execPath,
      ['--expose-gc', '--import', here('as_mutant.js'), here(`../proposals/${file}.test.js`)],
      { env: { ...process.env, MUTANT: named(mutant) }, stdio: 'ignore' },
    );
    if (status !== 0) return `proposals/${file}.test`;
  }
  return null;
}

/** The first conformance case that fails on one of these models, of which a random program may not reach every rule. */
async function failingCase(tried: Iterable<ModelOptions>): Promise<string | null> {
  for (const model of tried) {
    // The cases take a guest_memfd for granted, so there they fail for no fault of the mutant.
    if (!Machine.model(model).hasGuestMemfd) continue;
    const kernel = softwareKernel(model);
    const isMet = needsOf(() => new Scenario(kernel, forked(kernel)));
    for (const each of sections.flatMap((section) => section.cases)) {
      if (!each.needs.every(isMet)) continue;
      if (await judge(each, new Scenario(kernel, forked(kernel)))) return each.id;
    }
  }
  return null;
}

/** Both rules say the same errno on every kernel, so which of them speaks first cannot be seen at the boundary. */
function sameErrno({ list, index, rule, kind }: Mutant): boolean {
  const next = allRuleLists[list]?.[index + 1];
  return kind === 'swapped with the next' && typeof rule.errno === 'string' && rule.errno === next?.errno;
}

const { values } = parseArgs({ options: { only: { type: 'string' }, verbose: { type: 'boolean', default: false } } });
const total = { noticed: 0, explained: 0, unexplained: 0 };
const survivors: string[] = [];
for (const mutant of mutants()) {
  const name = named(mutant);
  if (values.only && !name.includes(values.only)) continue;
  const equal = sameErrno(mutant);
  const by = await noticed(mutant, equal);
  if (values.verbose) console.log(`${name}: ${by ?? 'SURVIVES'}`);
  if (by) {
    total.noticed++;
    continue;
  }
  const why = equal ? 'both have the same errno' : explainSurvivor(mutant.list, mutant.rule.name, mutant.kind);
  total[why ? 'explained' : 'unexplained']++;
  survivors.push(`  ${why ? '' : 'UNEXPLAINED '}${name}${why ? `: ${why}` : ''}`);
}
console.log(
  `${total.noticed} mutants noticed, ${survivors.length} not: ${total.explained} explained, ${total.unexplained} unexplained`,
);
console.log(survivors.join('\n'));
process.exitCode = total.unexplained > 0 ? 1 : 0;
