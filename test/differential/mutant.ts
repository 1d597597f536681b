import type { ErrnoName } from '../../lib/uapi.ts';
import { type AnyRule, allRuleLists } from './rules.ts';

/** Models that have one rule wrong. */

type Kind = 'removed' | 'errno changed' | 'swapped with the next';
const kinds: readonly Kind[] = ['removed', 'errno changed', 'swapped with the next'];

export interface Mutant {
  readonly list: string;
  readonly index: number;
  readonly rule: AnyRule;
  readonly kind: Kind;
  readonly rules: readonly AnyRule[];
}

/** The same text for the same mutant in every process. */
export function named({ list, index, rule, kind }: Mutant): string {
  return `${list} ${rule.name}: ${kind}${kind.startsWith('swapped') ? ` (${allRuleLists[list]?.[index + 1]?.name})` : ''}`;
}

export function* mutants(): Generator<Mutant> {
  for (const [list, rules] of Object.entries(allRuleLists)) {
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
