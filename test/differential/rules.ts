import { conversionRules } from '../../lib/kernel/rules/conversion.ts';
import { clearDirtyLogRules, getDirtyLogRules } from '../../lib/kernel/rules/dirty_log.ts';
import { grantRingRules } from '../../lib/kernel/rules/grant_ring.ts';
import { createGuestMemfdRules, fallocateRules, vfsFallocateRules } from '../../lib/kernel/rules/guest_memfd.ts';
import { linkRules } from '../../lib/kernel/rules/link.ts';
import { memoryAttributesRules } from '../../lib/kernel/rules/memory_attributes.ts';
import { memslotRules } from '../../lib/kernel/rules/memslot.ts';
import {
  lockActionRules,
  lockBoundRules,
  lockedRangeRules,
  lockedSlotRules,
  lockRules,
  unlockRules,
} from '../../lib/kernel/rules/memslot_lock.ts';
import type { Rule } from '../../lib/kernel/rules/rule.ts';
import { runRules } from '../../lib/kernel/rules/vcpu.ts';
import { createVmRules, enableCapRules } from '../../lib/kernel/rules/vm.ts';
import { transferRules } from '../../lib/kernel/software/guest_memfd_io.ts';
import { guestFileFallocateRules, guestFileRules, guestSealRules } from '../../lib/kernel/software/guest_seal_rules.ts';
import { mmapRules } from '../../lib/kernel/software/mmap_rules.ts';

// biome-ignore lint/suspicious/noExplicitAny: lists of rules on different subjects, which are only passed through.
export type AnyRule = Rule<any, any>;
type RuleList = readonly AnyRule[];

/** Every list of rules that decides an errno of the model of a kernel that exists, by name. */
export const ruleLists: Readonly<Record<string, RuleList>> = {
  createVm: createVmRules,
  createGuestMemfd: createGuestMemfdRules,
  memslot: memslotRules,
  memoryAttributes: memoryAttributesRules,
  fallocate: fallocateRules,
  vfsFallocate: vfsFallocateRules,
  enableCap: enableCapRules,
  getDirtyLog: getDirtyLogRules,
  clearDirtyLog: clearDirtyLogRules,
  mmap: mmapRules,
};

/** Those of what random programs do not call: the interfaces that are only proposed, and guests of their own. */
export const otherRuleLists: Readonly<Record<string, RuleList>> = {
  run: runRules,
  conversion: conversionRules,
  grantRing: grantRingRules,
  guestSeal: guestSealRules,
  guestFile: guestFileRules,
  guestFileFallocate: guestFileFallocateRules,
  transfer: transferRules,
  link: linkRules,
  lockAction: lockActionRules,
  lock: lockRules,
  lockBound: lockBoundRules,
  unlock: unlockRules,
  lockedSlot: lockedSlotRules,
  lockedRange: lockedRangeRules,
};

export const allRuleLists: Readonly<Record<string, RuleList>> = { ...ruleLists, ...otherRuleLists };

/** The lists are constant to everyone but these tests, which put others in a rule's place for a while. */
export function replaceRules(list: RuleList, rules: RuleList): void {
  (list as AnyRule[]).splice(0, list.length, ...rules);
}

/** How often each rule was the one that decided: counts what is checked inside `within`, and nothing else. */
export class RuleCounter {
  /** By list, and place in it. */
  readonly counts: Readonly<Record<string, number[]>> = mapLists((rules) => rules.map(() => 0));
  #counting = false;

  constructor() {
    for (const [name, list] of Object.entries(ruleLists)) {
      replaceRules(
        list,
        list.map((rule, index) => this.#counted(rule, this.counts[name] as number[], index)),
      );
    }
  }

  readonly within = <T>(call: () => T): T => {
    this.#counting = true;
    try {
      return call();
    } finally {
      this.#counting = false;
    }
  };

  /** A check stops at the first rule that is broken, so that is the one that decides. */
  #counted(rule: AnyRule, counts: number[], index: number): AnyRule {
    return {
      ...rule,
      broken: (subject, request) => {
        const sentence = rule.broken(subject, request);
        if (sentence && this.#counting) counts[index] = (counts[index] ?? 0) + 1;
        return sentence;
      },
    };
  }
}

function mapLists<T>(map: (rules: RuleList) => T): Record<string, T> {
  return Object.fromEntries(Object.entries(ruleLists).map(([name, rules]) => [name, map(rules)]));
}
