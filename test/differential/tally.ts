import type { ModelOptions } from '../../lib/model_options.ts';
import type { Outcome } from '../conformance/scenario.ts';
import type { Step } from './program.ts';
import { type RuleCounter, ruleLists } from './rules.ts';
import type { Observer } from './run.ts';
import { unreachable } from './unreachable.ts';
import { summary } from './world.ts';

/** What came up in a run: each call with each answer, and what was not sent. */
export class Tally implements Observer {
  calls = 0;
  readonly #answers = new Map<string, Map<string, number>>();
  readonly #excluded = new Map<string, number>();

  step(step: Step, outcome: Outcome): void {
    this.calls++;
    let answers = this.#answers.get(step.call);
    if (!answers) {
      answers = new Map();
      this.#answers.set(step.call, answers);
    }
    const answer = summary(outcome);
    answers.set(answer, (answers.get(answer) ?? 0) + 1);
  }

  excluded(reason: string): void {
    this.#excluded.set(reason, (this.#excluded.get(reason) ?? 0) + 1);
  }

  lines(): string[] {
    const calls = [...this.#answers].sort(([a], [b]) => a.localeCompare(b));
    const lines = calls.map(([call, answers]) => `  ${call.padEnd(22)} ${counts(answers)}`);
    if (this.#excluded.size > 0) lines.push('not sent:', `  ${counts(this.#excluded)}`);
    return lines;
  }
}

function counts(map: ReadonlyMap<string, number>): string {
  return [...map]
    .sort(([, a], [, b]) => b - a)
    .map(([name, count]) => `${name} ${count}`)
    .join(', ');
}

/** How often each rule decided, one list a line; those below `bar` once more at the end, with the reason where it is known. */
export function ruleLines(counter: RuleCounter, model: ModelOptions, bar: number): string[] {
  const [rare, never]: [string[], string[]] = [[], []];
  const lines = Object.entries(ruleLists).map(([name, rules]) => {
    const each = rules.map((rule, index) => {
      const count = counter.counts[name]?.[index] ?? 0;
      const reason = unreachable(model, name, rule.name, index);
      if (reason) never.push(`  ${name} ${rule.name}: ${reason}${count > 0 ? `, AND YET ${count}` : ''}`);
      else if (count < bar) rare.push(`${name} ${rule.name} (${count})`);
      return `${rule.name} ${count}`;
    });
    return `  ${name}: ${each.join(', ')}`;
  });
  lines.push('cannot decide on this kernel:', ...never);
  return rare.length > 0 ? [...lines, `fewer than ${bar} times: ${rare.join(', ')}`] : lines;
}
