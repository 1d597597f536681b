import { parseArgs } from 'node:util';
import { softwareKernel } from '../../lib/kernel/index.ts';
import { Machine } from '../../lib/kernel/machine.ts';
import { kernelVersions, type ModelOptions } from '../../lib/model_options.ts';
import type { ErrnoName } from '../../lib/uapi.ts';
import { sections } from '../conformance/cases/index.ts';
import { Scenario } from '../conformance/scenario.ts';
import { forked, judge, needsOf } from '../conformance/suite.ts';
import { fuzz } from './fuzz.ts';
import { factsOf } from './machine.ts';
import type { Call } from './program.ts';
import { type AnyRule, replaceRules, ruleLists } from './rules.ts';
import { explainSurvivor } from './survivors.ts';
import { unreachable } from './unreachable.ts';

// `npm run mutants`: models that have one rule wrong. The fuzzer, against the model as it is, or a conformance case has to notice.

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

type Kind = 'removed' | 'errno changed' | 'swapped with the next';
const kinds: readonly Kind[] = ['removed', 'errno changed', 'swapped with the next'];

interface Mutant {
  readonly list: string;
  readonly index: number;
  readonly rule: AnyRule;
  readonly kind: Kind;
  readonly rules: readonly AnyRule[];
}

function* mutants(): Generator<Mutant> {
  for (const [list, rules] of Object.entries(ruleLists)) {
    const originals = [...rules];
    for (const [index, rule] of originals.entries()) {
      for (const kind of kinds) {
        const mutated = mutate(originals, index, kind);
        if (mutated) yield { list, index, rule, kind, rules: mutated };
      }
    }
  }
}

function mutate(rules: readonly AnyRule[], index: number, kind: Kind): readonly AnyRule[] | null {
  const [rule, next] = [rules[index] as AnyRule, rules[index + 1]];
  if (kind === 'removed') return rules.filter((_, other) => other !== index);
  if (kind === 'errno changed') return rules.with(index, { ...rule, errno: (s, r) => another(errnoOf(rule, s, r)) });
  return next ? rules.with(index, next).with(index + 1, rule) : null;
}

function errnoOf({ errno }: AnyRule, subject: unknown, request: unknown): ErrnoName {
  return typeof errno === 'string' ? errno : errno(subject, request);
}

function another(errno: ErrnoName): ErrnoName {
  return errno === 'EINVAL' ? 'EPERM' : 'EINVAL';
}

/** What noticed the mutant, or null. */
async function noticed(mutant: Mutant, hopeless: boolean): Promise<string | null> {
  const list = ruleLists[mutant.list] as readonly AnyRule[];
  const originals = [...list];
  const asMutant = <T>(call: () => T): T => {
    replaceRules(list, mutant.rules);
    try {
      return call();
    } finally {
      replaceRules(list, originals);
    }
  };
  const sensible = models.filter((model) => !unreachable(model, mutant.list, mutant.rule.name, mutant.index));
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
  const next = ruleLists[list]?.[index + 1];
  return kind === 'swapped with the next' && typeof rule.errno === 'string' && rule.errno === next?.errno;
}

const { values } = parseArgs({ options: { only: { type: 'string' }, verbose: { type: 'boolean', default: false } } });
const total = { noticed: 0, explained: 0, unexplained: 0 };
const survivors: string[] = [];
for (const mutant of mutants()) {
  const next = mutant.kind.startsWith('swapped') ? ` (${ruleLists[mutant.list]?.[mutant.index + 1]?.name})` : '';
  const name = `${mutant.list} ${mutant.rule.name}: ${mutant.kind}${next}`;
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
