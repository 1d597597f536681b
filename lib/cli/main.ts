#!/usr/bin/env node
import { createRequire } from 'node:module';
import { KvmError } from '../index.ts';
import { demo } from './demo.ts';
import { demoAsJson, demoAsText } from './demo_output.ts';
import { help } from './help.ts';
import { type Command, parseCommand, UsageError } from './options.ts';
import { drawFindings, probe } from './probe.ts';
import { paintFor } from './text.ts';

// Whoever reads has gone, as `head` does: there is nobody left to tell.
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error;
    process.exit();
  });
}

const { version } = createRequire(import.meta.url)('guest-memfd/package.json') as { version: string };
const write = (text: string): void => {
  process.stdout.write(text);
};

async function run(command: Command): Promise<void> {
  switch (command.name) {
    case 'help':
      return write(help(command.topic));
    case 'version':
      return write(`${version}\n`);
    case 'probe': {
      const findings = probe(command.options, version);
      if (command.options.json) return write(`${JSON.stringify(findings, null, 2)}\n`);
      return write(`${drawFindings(findings, paintFor(process.stdout)).join('\n')}\n`);
    }
    case 'demo': {
      const events = demo(command.options);
      return command.options.json ? demoAsJson(events, write) : demoAsText(events, paintFor(process.stdout), write);
    }
  }
}

/** Prints what went wrong and what to do about it. @returns the exit status */
function explain(error: unknown, command: Command | null): number {
  const paint = paintFor(process.stderr);
  const say = (text: string): void => console.error(text);
  const { message, stack } = error instanceof Error ? error : new Error(String(error));
  say(`${paint('red', 'guest-memfd:')} ${message}`);
  if (error instanceof UsageError) {
    say(`Try: guest-memfd help${error.topic ? ` ${error.topic}` : ''}`);
    return 2;
  }
  const hint = error instanceof KvmError ? withoutKvm(command) : null;
  if (hint) say(`Without it: ${hint}`);
  if (process.env.DEBUG) say(stack ?? '');
  else if (!(error instanceof KvmError)) say('DEBUG=1 shows where.');
  return 1;
}

/** The same on the software kernel, unless it was that. */
function withoutKvm(command: Command | null): string | null {
  if (command?.name !== 'probe' && command?.name !== 'demo') return null;
  if (command.options.open.backend === 'software') return null;
  const type = command.name === 'demo' && command.options.type === 'sw-protected' ? ' --type sw-protected' : '';
  return `guest-memfd ${command.name} --backend software${type}`;
}

let command: Command | null = null;
try {
  command = parseCommand(process.argv.slice(2));
  await run(command);
} catch (error) {
  process.exitCode = explain(error, command);
}
