/** A chat for a component: opened when mounted, stopped in the background, closed when unmounted. */
import { useCallback, useEffect, useState } from 'react';
import { AppState } from 'react-native';
import { useModel } from 'react-native-executorch';

import { type Answer, type Ask, Chat, type Progress } from './chat';
import { bundledFiles, type Files } from './files';

type Config = { readonly files: Files | undefined; readonly system: string | undefined };

/**
 * Uses the files that the app was built with, unless `files` are given. `text` is the answer as it
 * streams in; `error` says by its `reason` why there is no chat.
 */
export function useChat(options: { files?: Files; system?: string } = {}) {
  const [progress, setProgress] = useState<Progress>({ step: 'copying', done: 0 });
  const [text, setText] = useState('');
  const [isAnswering, setAnswering] = useState(false);
  const open = async ({ files, system }: Config) =>
    Chat.open(files ?? (await bundledFiles(setProgress)), { system, onProgress: setProgress });
  const { model: chat, error } = useModel(open, { files: options.files, system: options.system });

  useEffect(() => {
    const listener = AppState.addEventListener('change', (state) => {
      if (state === 'background') chat?.stop();
    });
    return () => listener.remove();
  }, [chat]);

  const say = useCallback(
    async (question: string, ask?: Ask): Promise<Answer | undefined> => {
      if (chat === undefined) return undefined;
      setText('');
      setAnswering(true);
      try {
        return await chat.say(question, (piece) => setText((before) => before + piece), ask);
      } finally {
        setAnswering(false);
      }
    },
    [chat],
  );
  return {
    isReady: chat !== undefined, isAnswering, progress, error, text, say,
    stop: useCallback(() => chat?.stop(), [chat]),
    reset: useCallback(() => chat?.reset(), [chat]),
  };
}
