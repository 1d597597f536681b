import { mkdirSync, writeFileSync } from 'node:fs';
import type { Test } from 'tap';
import type { Kernel } from '../../lib/kernel/kernel.ts';
import { sections } from './cases/index.ts';
import { type Case, describe, type InChild, matches, type Need, resolve, Scenario } from './scenario.ts';

/** How the cases went on one kernel, as `scripts/test.mjs` reads it. */
export interface Tally {
  readonly kernel: string;
  agree: number;
  disagree: number;
  /** The numbers of the cases that ran. */
  readonly ran: string[];
  /** Cases by what was missing. */
  readonly notApplicable: Record<string, number>;
}

/** Runs every case whose needs the kernel meets: a subtest per section, an assertion per case. */
export async function conform(t: Test, name: string, kernel: Kernel, inChild: InChild): Promise<Tally> {
  const tally: Tally = { kernel: name, agree: 0, disagree: 0, ran: [], notApplicable: {} };
  const answers = new Map<Need, boolean>();
  const isMet = (need: Need): boolean => {
    const known = answers.get(need);
    if (known !== undefined) return known;
    const s = new Scenario(kernel, inChild);
    const met = need.met(s);
    s.close();
    answers.set(need, met);
    return met;
  };
  for (const { title, cases } of sections) {
    const applicable = cases.filter(({ needs }) => {
      const unmet = needs.find((need) => !isMet(need));
      if (unmet) tally.notApplicable[unmet.missing] = (tally.notApplicable[unmet.missing] ?? 0) + 1;
      return !unmet;
    });
    if (applicable.length === 0) continue;
    await t.test(title, async (t) => {
      for (const each of applicable) {
        tally.ran.push(each.id);
        const difference = await judge(each, new Scenario(kernel, inChild));
        tally[difference ? 'disagree' : 'agree']++;
        if (difference) t.fail(`${each.id}: ${each.sentence}`, { ...difference, kernel: name, at: null, stack: '' });
        else t.pass(`${each.id}: ${each.sentence}`);
      }
    });
  }
  return tally;
}

/** Null when the kernel answers as the contract says, and everything could be given back afterwards. */
async function judge(each: Case, s: Scenario): Promise<{ expected: string; got: string } | null> {
  try {
    const { got, expected } = await each.run(s);
    const answer = resolve(expected, s.kernel);
    const left = s.close();
    if (!matches(got, answer)) return { expected: describe(answer), got: describe(got) };
    return left.length > 0 ? { expected: 'everything closed', got: `not closed: ${left.join(', ')}` } : null;
  } catch (error) {
    s.close();
    return { expected: 'an answer', got: String(error) };
  }
}

/** Leaves the tallies where `npm test` finds them, or the reason why there are none. */
export function publish(family: string, tallies: readonly Tally[], reason?: string): void {
  const folder = new URL('../../../.tap/conformance/', import.meta.url);
  mkdirSync(folder, { recursive: true });
  writeFileSync(
    new URL(`${family}.json`, folder),
    JSON.stringify({ tallies: tallies.map(({ ran: _, ...counts }) => counts), reason }),
  );
}
